"""The operations of the models: for each one file with the maths, the shapes and the torch path. Knows no model and no service."""
