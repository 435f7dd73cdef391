"""One Accelerate loop for every model, and what is particular to each of them."""
