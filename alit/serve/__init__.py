"""A page to play with: an image, a slider over its tokens, and what each number of them keeps (``alit serve``)."""
