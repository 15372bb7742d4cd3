"""Models of init_model.py: arguments, configurations, tokenizer, image processor."""
