"""`laser-dist doctor`: checks of a machine and of a recipe, each with what was found and how to mend it."""
