"""A site's records, from the file to token ids. Nothing here may import a model or the network."""
