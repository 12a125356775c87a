"""Interactive page: an image, a slider over its tokens, and the reconstruction from so many (``alit serve``)."""
