"""Qwen3-MoE and DeepSeek-V2 in Flax NNX, their attention over the zigzag ring.

    sharding     logical axes, rules, mesh: where every array lives; drawing a model onto the devices that keep it
    layers       linear, embedding, norm, SwiGLU                  options    how the kernels run
    rope         the rotary embedding and its scalings
    router, moe  which experts, and the experts                   balance    keeping their load level
    stack        equal layers as one scan, rematerialisation
    config       reading config.json without dropping anything
    decoder      the transformer that both are
    qwen3, qwen3_moe, deepseek_v2    their sizes, attention and experts
    registry     model_type -> sizes -> module                    presets    models by name
    decode       token by token, with what the layers keep       memory     one token's attention over what was kept
    generate     a command line: hear whether a model speaks
    devices      the CPU where there is no GPU
    hf/          Hugging Face's folders, both ways, and the command line

A model is built with `sharding.init_state` and used functionally: `nnx.merge(graphdef, state)(tokens, positions)`.
"""
