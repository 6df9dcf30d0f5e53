"""The dashboard's own files: HTML, CSS and ES modules. No code of the daemon lies here."""
