"""The network and what runs it: configuration, processor, static-shape graphs, host engine, generation.

`configuration` is plain dataclasses; `configuration_kimi_vl`, `image_processing`, `tokenization` and `processing` are
the classes that transformers' users know. `vision` and `language` are the network, `kernels` its backends, `graphs` the
static-shape entry points. `engine` feeds graphs from the host, `forward` and `generation` are the calls that the network
(`modeling_kimi_vl`) and a reloaded bundle share.
"""
