"""Model types whose activations can't be captured, with the reason, so that their registration is refused.

Only a loaded model proves that it can be captured; this table spares people its download. The model's own process looks
here too, so that both services give the same reason.
"""

# ruff: noqa: SIM905 -- as a list of strings the names would take pages

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace_models.quantized import problem_of as problem_of_quantized


def why_unsupported(config: Mapping[str, Any]) -> str:
    """Returns why no hookpoint of a model can be captured, as far as its config tells; empty if nothing is against it.

    The reason completes the sentence that begins with the model's type.
    """
    model_type = str(config.get("model_type") or "")
    if config.get("is_encoder_decoder") is True or model_type in _ENCODER_DECODERS:
        return _TWO_TEXTS
    if model_type == "big_bird" and config.get("attention_type", "block_sparse") != "original_full":
        return _SWITCHES
    return _REASONS.get(model_type, "")


def problem_of(config: Mapping[str, Any]) -> str:
    """Says why no runner can use a model's files, as far as the config tells; empty if nothing is against it."""
    if why := why_unsupported(config):
        return f"no hookpoint of a model of type {str(config.get('model_type') or '')[:80]!r} can be captured: {why}"
    return problem_of_quantized(config)


def known_types() -> frozenset[str]:
    """Returns the model types that are refused whatever their config says."""
    return _ENCODER_DECODERS.union(_REASONS)


_TWO_TEXTS = "it is an encoder with a decoder, and a text alone does not tell which tokens each of them is given"
_NO_TEXT = "it reads pictures, sound or series of numbers, no text"
_WITH_OTHERS = "its code takes no text without pictures or sound"
_STREAMS = "its residual stream is several streams side by side, not one row for each token"
_SWITCHES = (
    "its sparse attention becomes full attention with the first short text and stays so, which changes the rows of all "
    "longer ones; with attention_type original_full in its config.json it can be"
)
_MERGED = "its blocks do not keep one row for each token"
# Published configs of these types may leave out `is_encoder_decoder`, which is true by default.
_ENCODER_DECODERS = frozenset(
    """
    bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus pegasus_x
    plbart prophetnet seamless_m4t seamless_m4t_v2 switch_transformers t5 t5gemma t5gemma2 udop umt5
    """.split()
)
_WITHOUT_TEXT = frozenset(
    """
    aimv2_vision_model audio-spectrogram-transformer audioflamingo3_encoder autoformer bark beit bit blip_2_qformer
    canary chinese_clip_vision_model clip_vision_model cohere_asr cohere_compass_vision conditional_detr convnext
    convnextv2 cosmos3_edge_vision cvt d_fine dab-detr dac data2vec-audio data2vec-vision decision_transformer
    deformable_detr deimv2 deit depth_pro detr dinat dinov2 dinov2_with_registers dinov3_convnext dinov3_vit
    donut-swin dpt edgetam edgetam_video edgetam_vision_model efficientloftr efficientnet encodec exaone4_5_vision
    focalnet fun_asr_nano_encoder gemma3n_audio gemma3n_vision gemma4_audio gemma4_vision glm4v_moe_vision
    glm4v_vision glm5_next_vision glm_image_vision glm_image_vqmodel glm_ocr_vision glmasr_encoder glpn
    granite_docling_vision granite_speech5_ctc granite_speech5_encoder hgnet_v2 hiera higgs_audio_v2_tokenizer hubert
    hunyuan_vl_vision idefics3_vision ijepa informer inkling2_vision internvl_vision kimi_k25_vision lasr_ctc
    lasr_encoder levit lfm3_vl_vision lightglue lw_detr mask2former maskformer maskformer-swin mgp-str mimi
    mimi_decoder mimi_encoder minicpm_ocr_vision minicpmv4_7_vision mlcd mlcd_vision_model mobilenet_v1 mobilenet_v2
    mobilevit mobilevitv2 moonshine moonshine_streaming moss_transcribe_diarize_audio muse_glimmer_assistant
    muse_glimmer_vision muse_spark_audio muse_spark_vision nemotron3_5_asr nemotron3_5_transcribe_asr_audio
    nemotron3_5_transcribe_audio nemotron3_5_transcribe_word_timestamp nemotron3_diarization
    nemotron3_diarization_audio nemotron_asr_streaming nemotron_asr_streaming_encoder neucodec omdet-turbo oneformer
    parakeet_ctc parakeet_encoder parakeet_rnnt parakeet_tdt patchtsmixer patchtst pe_audio_encoder
    pe_audio_video_encoder pe_video_encoder pixio pixtral pocket_tts_audio_tokenizer
    pocket_tts_audio_tokenizer_decoder pocket_tts_audio_tokenizer_encoder poolformer pp_doclayout_v3 pp_doclayout_v4
    pp_ocrv5_mobile_rec pp_ocrv5_server_rec pp_ocrv6_medium_det pp_ocrv6_small_det pp_ocrv6_small_rec
    pp_ocrv6_tiny_rec pvt pvt_v2 qianfan_ocr_vision qwen2_5_vl_vision qwen2_audio_encoder qwen3_5_moe_vision
    qwen3_5_vision qwen3_asr_encoder qwen3_vl_moe_vision qwen3_vl_vision qwen4_exp_vision radio regnet resnet rf_detr
    rt_detr rt_detr_v2 sam sam2 sam2_hiera_det_model sam2_video sam2_vision_model sam3_tracker sam3_tracker_video
    sam3_video sam3_vision_model sam3_vit_model sam_hq sam_hq_vision_model sam_vision_model sapiens2 segformer seggpt
    sew sew-d siglip2_vision_model siglip_vision_model smolvlm_vision speech_to_text speecht5 swiftformer swin swin2sr
    swinv2 table-transformer textnet time_series_transformer timesfm timesfm2_5 timesformer timm_backbone timm_wrapper
    tipsv2_vision_model unispeech unispeech-sat univnet uvdoc vibevoice_acoustic_tokenizer
    vibevoice_acoustic_tokenizer_decoder vibevoice_acoustic_tokenizer_encoder video_llama_3_vision videomae
    videoprism_vision_model vit vit_mae vit_msn vitdet vivit vjepa2 voxtral_encoder voxtral_realtime_encoder wav2vec2
    wav2vec2-bert wav2vec2-conformer wavlm whisper xcodec xcodec2 yolos
    """.split()
)
_REASONS: Mapping[str, str] = {
    **dict.fromkeys(_WITHOUT_TEXT, _NO_TEXT),
    **dict.fromkeys(("deepseek_v4", "gemma3n", "gemma3n_text", "hy_v4", "reformer"), _STREAMS),
    **dict.fromkeys(("blt", "canine", "cpmant", "diffusion_gemma", "funnel", "perceiver"), _MERGED),
    **dict.fromkeys(("albert", "hrm_text"), "a text passes the same blocks several times, with other rows each time"),
    **dict.fromkeys(("blip", "blip-2", "instructblip", "instructblipvideo", "pi0", "voxtral_realtime"), _WITH_OTHERS),
    **dict.fromkeys(("flaubert", "xlm"), "its code has no blocks that pass rows on"),
    "mllama": "a text without pictures skips some of its blocks",
    "squeezebert": "its tensors have channels before tokens, which would mix the numbers of rows",
    "longformer": "its code pads every text to a multiple of its window, and the rows with it",
    "xlnet": "its code has tokens before sequences in its tensors, which would exchange rows of documents",
}
