"""CC-Tuning, literally: a stock model, layer outputs, loops over rows. Slow, and independent of cc_ds.

FFN outputs are not read from any module: a layer's is the difference between the layer's output and its output with
every weight of its feed-forward block zero, which leaves the residual stream alone.
"""

from __future__ import annotations

import copy

import torch


def ffn_outputs(model, layers, input_ids, attention_mask, anchors) -> torch.Tensor:
    """(L, B, H): what each layer's feed-forward block adds to the residual stream at the anchors."""
    return torch.stack(
        [
            _layer_output(model, layers, index, input_ids, attention_mask, anchors, with_ffn=True)
            - _layer_output(model, layers, index, input_ids, attention_mask, anchors, with_ffn=False)
            for index in range(len(layers))
        ]
    )


def _layer_output(model, layers, index, input_ids, attention_mask, anchors, with_ffn) -> torch.Tensor:
    layer = layers[index]
    kept = copy.deepcopy(layer.mlp.state_dict())
    seen = {}
    handle = layer.register_forward_hook(lambda module, args, output: seen.update(output=output))
    try:
        with torch.no_grad():
            if not with_ffn:
                for parameter in layer.mlp.parameters():
                    parameter.zero_()
            model(input_ids=input_ids, attention_mask=attention_mask)
    finally:
        handle.remove()
        layer.mlp.load_state_dict(kept)
    return torch.stack([seen["output"][row, anchor] for row, anchor in enumerate(anchors.tolist())])


def connected_logits(model, layers, weight, english_LBH, input_ids, attention_mask, anchors, noise):
    """Logits (B, T, V), choice (B,), decision logits (B, L): the chosen E is added after layer 0 of the target pass."""
    embedded = {}
    handle = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: embedded.update(hidden=args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(input_ids=input_ids, attention_mask=attention_mask)
    handle.remove()
    choices, decision_logits = [], []
    for row, anchor in enumerate(anchors.tolist()):
        vector = english_LBH[:, row].mean(dim=0) + embedded["hidden"][row, anchor]
        decision_logits.append(weight @ vector)
        choices.append(int((decision_logits[-1] + noise[row]).argmax()))

    def add(module, args, output):
        output = output.clone()
        for row, anchor in enumerate(anchors.tolist()):
            output[row, anchor] += english_LBH[choices[row], row]
        return output

    handle = layers[0].register_forward_hook(add)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    handle.remove()
    return logits, torch.tensor(choices), torch.stack(decision_logits)
