"""Hugging Face folders that any host exports: written whole or not at all, and proven."""
