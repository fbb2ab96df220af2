"""Write a random Llama checkpoint with a throwaway tokenizer: for dry runs and memory figures.

python experiments/random_llama.py out/llama-1b --shape=1b --texts=pairs.jsonl
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from model import ModelConfig, Transformer, save_pretrained

SHAPES = {  # vocabulary, width, feed-forward, layers, heads, key-value heads
    "tiny": (1000, 64, 176, 2, 4, 2),
    "135m": (49152, 576, 1536, 30, 9, 3),  # SmolLM
    "1b": (32000, 2048, 5632, 22, 32, 4),  # TinyLlama
    "7b": (32000, 4096, 11008, 32, 32, 32),  # Llama 2
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--texts", required=True, help="a preference file to train a tokenizer on")
    args = parser.parse_args()
    vocab, width, feed_forward, layers, heads, kv_heads = SHAPES[args.shape]
    args.directory.mkdir(parents=True, exist_ok=True)
    data.Tokenizer.train(data.read_preferences(args.texts), args.directory, vocab)
    tokenizer = data.Tokenizer(args.directory)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    shape = vocab, width, feed_forward, layers, heads, kv_heads, width // heads
    with torch.device("meta"):  # not drawn twice
        model = Transformer(ModelConfig(*shape, max_position_embeddings=4096, **ids))
    model.to_empty(device="cpu").init_weights(0)
    save_pretrained(model, args.directory)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {args.directory}")


if __name__ == "__main__":
    main()
