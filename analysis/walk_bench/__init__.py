"""``minitf bench walk``: reading, editing, sweeping and decoding, beside the tools that people use."""
