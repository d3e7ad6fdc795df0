"""What `laser-dist inspect` is made of: a survey of all rows, signs of trouble, examples as the trainer sees them."""
