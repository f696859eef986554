"""What several test files build their cases from; tiny models of every family are in models.py."""
