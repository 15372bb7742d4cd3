"""One module a task: its arguments, its rows as the model's inputs, its scores."""
