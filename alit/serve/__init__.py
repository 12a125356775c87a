"""A page to play with: a picture, a slider over its tokens, and what each number of them keeps (``alit serve``)."""
