"Tiny random models of real architectures for tests."
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    Qwen3Config,
    SiglipVisionConfig,
)

IMAGE, PAD, EOS, VOCAB = 60, 0, 1, 64


def internvl(seed: int = 0, layers: int = 2, pixels: int = 24, image: int = IMAGE, vocab: int = VOCAB) -> InternVLForConditionalGeneration:
    "InternVL with a Qwen3 text model; a picture of 24 pixels is 9 tokens."
    torch.manual_seed(seed)
    vision = InternVLVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                                  image_size=[pixels, pixels], patch_size=[4, 4])
    text = Qwen3Config(vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=PAD, eos_token_id=EOS,
                       bos_token_id=None, tie_word_embeddings=True)
    model = InternVLForConditionalGeneration(InternVLConfig(vision_config=vision, text_config=text, image_token_id=image,
                                                            image_seq_length=(pixels // 8)**2))
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return liven(model)


def gemma3(seed: int = 0, pixels: int = 24, image: int = IMAGE, vocab: int = VOCAB) -> Gemma3ForConditionalGeneration:
    "Gemma 3 with a SigLIP tower; a picture of 24 pixels is 9 tokens."
    torch.manual_seed(seed)
    vision = SiglipVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=pixels,
                                patch_size=4)
    text = Gemma3TextConfig(vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=PAD, eos_token_id=EOS,
                            bos_token_id=2, sliding_window=16)
    model = Gemma3ForConditionalGeneration(Gemma3Config(vision_config=vision, text_config=text, image_token_index=image,
                                                        mm_tokens_per_image=(pixels // 8)**2, boi_token_index=61, eoi_token_index=62))
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # zeros as they come
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return liven(model)


def idefics3(seed: int = 0, pixels: int = 16, image: int = IMAGE, vocab: int = VOCAB) -> Idefics3ForConditionalGeneration:
    "Idefics 3 with a Llama text model; a picture or a tile of 16 pixels is 4 tokens."
    torch.manual_seed(seed)
    vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=pixels, patch_size=4)
    text = LlamaConfig(vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, pad_token_id=PAD, eos_token_id=EOS)
    model = Idefics3ForConditionalGeneration(Idefics3Config(vision_config=vision, text_config=text, image_token_id=image, scale_factor=2,
                                                            pad_token_id=PAD))
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return liven(model)


def liven(model: torch.nn.Module) -> torch.nn.Module:
    "Larger weights, so that inputs and adapters visibly matter."
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2: p.mul_(3)
    return model.eval()


def batch(model: torch.nn.Module, rows: int = 2, words: int = 6, answer: int = 3, seed: int = 0, labels: bool = True) -> dict:
    "Picture, question, answer: `[image x 9, words, answer]` a row."
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(2, IMAGE, (rows, n), generator=generator)
    ids = torch.cat([torch.full((rows, 9), IMAGE), draw(words), draw(answer)], 1)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[:, 10:9 + words] = True
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(rows, 3, 24, 24, generator=generator),
            "instruction_mask": mask}
    if model.config.model_type == "gemma3": made["token_type_ids"] = (ids == IMAGE).long()
    if labels: made["labels"] = ids.masked_fill(torch.arange(ids.shape[1]) < 9 + words, -100)
    return made


def stir(model: torch.nn.Module, seed: int = 1, scale: float = 0.3) -> torch.nn.Module:
    "Random experts and slow routers that differ from the live ones, as after some training."
    generator = torch.Generator().manual_seed(seed)
    noise = lambda t: scale * torch.randn(t.shape, generator=generator)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".strlora_experts." in name: p.copy_(noise(p))
        for name, buffer in model.named_buffers():
            if ".ema." in name: buffer.add_(noise(buffer))
    return model
