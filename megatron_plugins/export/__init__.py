"""From a Megatron ``torch_dist`` checkpoint to a Hugging Face folder, without Megatron or a GPU.

``restricted`` reads its pickles, ``checkpoint`` its tensors, ``arguments`` turns its arguments
into a configuration or refuses them, ``mapping`` renames and reorders tensors,
:mod:`torch_plugins.export` writes the folder, ``verify`` compares logits, ``run`` does all of it in
order.
"""
