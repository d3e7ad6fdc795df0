"""Starting a run on one host or many, and starting it again: everything around the ranks, nothing inside them."""
