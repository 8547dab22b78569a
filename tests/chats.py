"Chat templates of the families, written out by their formats, and processors that use them, made in milliseconds."
import json
import types

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import Gemma3Processor, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from strlora.backbones.processor import toy_processor, toy_tokenizer
from strlora.backbones.table import INTERNVL_TEMPLATE

PARTS = ("{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
         "{% if part.type == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}")

# Qwen 2.5: a system prompt of its own; the assistant's turn marked for training
QWEN25 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}" + PARTS + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}" + PARTS + "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

# Qwen 3: an empty thought before the last answer, in the prompt only if thinking is switched off
QWEN3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}" + PARTS +
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}")

# Gemma 3: begins with <bos>, puts the system prompt before the first question, trims texts, calls the assistant model
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if message['role'] == 'assistant' -%}
        {%- set role = 'model' -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""

# SmolVLM / Idefics 3: no special token between role and text, the turn ends with its own token
IDEFICS3 = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")

CORPUS = "user model what colour is the car? answer with a single word. red blue"


def gemma_tokenizer():
    "Spaces become ▁, unknown characters become bytes, line breaks are added tokens, <bos> is added by itself."
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator([CORPUS.replace(" ", "▁")] * 2,
                                trainers.BpeTrainer(vocab_size=360, special_tokens=names, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    core = Tokenizer(models.BPE(learnt["vocab"], [tuple(pair) for pair in learnt["merges"]], byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.add_tokens(["\n", "\n\n"])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
                              "start_turn_token": "<start_of_turn>", "end_turn_token": "<end_of_turn>"})
    return tokenizer


def gemma(template=GEMMA3):
    "Gemma 3's own processor."
    pixels = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Processor(pixels, gemma_tokenizer(), chat_template=template, image_seq_length=4)


def idefics(template=IDEFICS3):
    "Idefics 3's own processor; large images are cut into tiles with marks of row and column."
    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [
        "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
        *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))]})
    pixels = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return Idefics3Processor(pixels, tokenizer, image_seq_len=4, chat_template=template)


def internvl(template=INTERNVL_TEMPLATE, tokenizer=None, **kwargs):
    "InternVL's processor without video."
    return toy_processor(template, tokenizer or toy_tokenizer(CORPUS), **kwargs)


FAMILIES = {"internvl": internvl, "qwen2.5": lambda: internvl(QWEN25), "qwen3": lambda: internvl(QWEN3), "gemma3": gemma,
            "idefics3": idefics}


def picture(width=24, height=24, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def sample(instruction="what colour is the car? answer with a single word.", answer="red", id="a", images=1, size=(24, 24)):
    return types.SimpleNamespace(id=id, instruction=instruction, answer=answer,
                                 images=tuple(picture(*size, seed=i) for i in range(images)))
