"""What was spent on a data set. Nothing here may import a model, a task or the trainer."""
