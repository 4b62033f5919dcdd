"""``minitf walk``: one text through one model, its walk on a page."""
