"Ask the models of two runs about some pictures and keep how they were routed, for the page on which to look at it."
from pathlib import Path

from strlora.chat import Speaker
from strlora.data.mini.bench import test_set
from strlora.view import kept

ROOT = Path(__file__).resolve().parents[1] / "results" / "mini"
ASKED = (("gqa", 0), ("chart", 3), ("rs", 1), ("fin", 0))   # whose pictures are shown
MORE = (("vqa", 1),)                                        # whose question is asked, too

if __name__ == "__main__":
    samples = [test_set(task).samples[place] for task, place in ASKED + MORE]
    for method in ("strlora", "strlora_prototypes"):
        (ROOT / "view").mkdir(exist_ok=True)
        kept(Speaker(ROOT / "windows" / method / "seed3"), [s.images[0] for s in samples[:len(ASKED)]], [s.instruction for s in samples],
             ROOT / "view" / f"{method}.json", 18)
