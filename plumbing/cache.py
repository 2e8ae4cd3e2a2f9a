"""The KV cache of common.generate. transformers' own copies all keys and values at every token.
This reserves its memory once and writes into it. Any Cache with batch_select_indices works too."""
import torch
from transformers.cache_utils import Cache, DynamicLayer

def in_place_cache(config, room):
    """An empty Cache for a model of this config; room: the most tokens of a row, with padding"""
    layers = config.get_text_config().num_hidden_layers
    return Cache(layers=[InPlaceLayer(room) for _ in range(layers)])

class InPlaceLayer(DynamicLayer):
    """keys and values [B, heads, room, size], of which the first rows and columns are in use"""
    def __init__(self, room):
        super().__init__()
        self.room = room
        self.length = 0

    def update(self, keys, values, *_, **__):
        B, heads, n, size = keys.shape
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys = keys.new_empty(B, heads, self.room, size)
            self.values = values.new_empty(B, heads, self.room, values.shape[3])
        start = self.length
        self.length += n
        self.keys[:B, :, start:self.length] = keys
        self.values[:B, :, start:self.length] = values
        return self.keys[:B, :, :self.length], self.values[:B, :, :self.length]

    def batch_select_indices(self, rows):
        """Row i becomes what rows[i] was; a row that keeps its place is not copied"""
        moved = rows != torch.arange(len(rows), device=rows.device)
        for store in (self.keys, self.values):
            store[:len(rows)][moved] = store[rows[moved]]

    def get_seq_length(self):
        return self.length
