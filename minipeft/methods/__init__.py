"""Parameter-efficient fine-tuning: methods (one file each), and what attaches, selects, saves and counts them."""
