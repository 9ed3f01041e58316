"""What is kept: receipts."""
