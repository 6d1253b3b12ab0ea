"""How plugins get into an unmodified host. Standard library only."""
