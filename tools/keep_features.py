"Measure what tells the tasks of the mini benchmark apart and keep it, for the page that draws it; the same on every call."
from pathlib import Path

import torch

from strlora.rivals import job_of
from strlora.separable import measured
from strlora.tuner.root import input_embeddings

ROOT = Path(__file__).resolve().parents[1] / "results" / "mini"

if __name__ == "__main__":
    torch.set_num_threads(1)
    job = job_of("lora")
    found = measured(input_embeddings(job.model).weight.detach(), job.processor.tokenizer, job.encode)
    small = found.astype({"silhouette": "float32", "x": "float32", "y": "float32", "kind": "category", "task": "category"})
    (ROOT / "view").mkdir(exist_ok=True)
    small.to_parquet(ROOT / "view" / "features.parquet", compression="zstd")
