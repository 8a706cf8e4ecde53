"""PEFT methods and adapter folders. Nothing here may import the adapted model."""
