"""From a DeepSpeed checkpoint to a Hugging Face folder.

``checkpoint`` vets the pickles and reads what DeepSpeed consolidates from them, ``run`` writes the
folder and compares logits.
"""
