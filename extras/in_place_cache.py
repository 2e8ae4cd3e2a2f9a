"""The KV cache of common.generate. transformers' own copies itself whole at every token; this one takes its room once
and writes into it. Any other Cache that knows batch_select_indices would do in its place."""
import torch
from transformers.cache_utils import Cache, DynamicLayer


def in_place_cache(config, room):
    """A Cache for a model of this config, empty; room: the most tokens a row may get, padding and prompt included"""
    return Cache(layers=[InPlaceLayer(room) for _ in range(config.get_text_config().num_hidden_layers)])


class InPlaceLayer(DynamicLayer):
    """keys and values [B, heads, room, size], of which the first rows and columns are in use"""

    def __init__(self, room):
        super().__init__()
        self.room, self.length = room, 0

    def update(self, keys, values, *_, **__):
        B, heads, n, size = keys.shape
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys = keys.new_empty(B, heads, self.room, size)
            self.values = values.new_empty(B, heads, self.room, values.shape[3])
        start, self.length = self.length, self.length + n
        self.keys[:B, :, start:self.length], self.values[:B, :, start:self.length] = keys, values
        return self.keys[:B, :, :self.length], self.values[:B, :, :self.length]

    def batch_select_indices(self, rows):
        """Row i is now what rows[i] was; one that stays in its place is not copied"""
        moved = rows != torch.arange(len(rows), device=rows.device)
        for store in (self.keys, self.values):
            store[:len(rows)][moved] = store[rows[moved]]

    def get_seq_length(self):
        return self.length
