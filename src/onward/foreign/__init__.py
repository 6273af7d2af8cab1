"""Other tools' layouts: recognise and describe, one file each."""
