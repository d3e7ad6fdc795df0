"""`laser-dist study`: methods x seeds x datasets as separate runs, and one report of what came out."""
