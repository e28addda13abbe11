"""ftbook: pretraining and fine-tuning, the library behind the book.

Names resolve on first use (PEP 562): `import ftbook` is light, `from ftbook import fit` loads PyTorch once, and a chapter's
methods load what they need. Each module is exported from the notebook of its chapter in nbs/.
"""

import importlib

__version__ = "0.1.0"

# module -> the names that are also reachable as ftbook.NAME; everything else through its module, as in ftbook.peft.load
PUBLIC = {
    "runtime": "profile pick device seed_everything native_bf16 Meter",
    "plot": "",
    "results": "row record say table sweep study load_study Baseline ChosenFor difference",
    "images": "ImageSet read_folder",
    "tags": "entity_f1",
    "corpus": "read_conll",
    "derive": "",
    "data": "TextSet Batches",
    "models": "",
    "losses": "mse bce_with_logits cross_entropy focal label_smoothing distillation_kl info_nce dpo calibration_error",
    "optim": "SGD AdaGrad RMSProp Adam AdamW Lion Muon range_test",
    "texts": "TextClassifier encode_texts read_table",
    "batches": "",
    "compute": "",
    "scoring": "",
    "checkpoint": "",
    "train": "fit evaluate predict Settings History EarlyStopping Checkpoint",
    "finetune": "freeze unfreeze param_groups replace_head find_head GradualUnfreezing Strategy TwoStage tune report",
    "autoencoder": "Autoencoder ConvAutoencoder MaskedViT masked_patches classifier_from",
    "contrastive": "SimCLR DINO nt_xent",
    "mlm": "mask_tokens fill_mask",
    "causal": "Decoder load_decoder generate",
    "vision": "TwoConvCNN backbone predict_topk saliency grad_cam",
    "ner": "NERTagger",
    "peft": "LoRA DoRA IA3 BitFit Houlsby Pfeiffer PromptTuning PrefixTuning",
    "regularize": "Proximal WeightAverage l2_sp mixout penalty",
    "augment": "MixUp CutMix",
    "search": "successive_halving expected_best",
    "compress": "Grid quantize_layers prune Pruning low_rank",
    "prompt": "Prompt label_scores calibrate pair_loss SetFit",
    "sft": "Template JsonFormat",
    "preference": "CartPole Policy Rollouts grpo_loss",
    "together": "vote Stacking soup MultiTask TaskBatches pcgrad",
    "distill": "SoftLabels teacher_logits fit_soft cut Match",
    "adapt": "two_sample_test Aligned self_train label_shift target_statistics",
    "adversarial": "fgsm pgd withstands Attacked Agree NearTexts edit_attack",
    "explain": "swap_gaps SwapPairs integrated_gradients deletion",
    "continual": "learn Pull Replay transfer gate",
    "choose": "compare fits logme learning_curve suspects",
    "distributed": "launch all_reduce train_parallel SplitLinear ShardedRows",
    "deploy": "pack verify serve load_test psi drift_test Monitor refresh",
    "tasks": "RECIPES Segmenter Detector log_mel SpecAugment PairEncoder",
}
_WHERE = {name: module for module, names in PUBLIC.items() for name in names.split()}
__all__ = ["__version__", *PUBLIC]  # what help() prints; `dir` and completion know the names too


def __getattr__(name: str):
    if name in PUBLIC:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _WHERE:
        value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its modules are {', '.join(PUBLIC)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_WHERE})
