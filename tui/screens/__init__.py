"""The numbered screens and the dialogs above them, one file each, its style sheet beside it."""
