"""The datasets of the ready-made studies, made of their authors' own files: `laser-dist dataset`."""
