"""Planning: what a step of a method needs in memory and arithmetic, before a GPU is rented."""
