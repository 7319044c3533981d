"""Contents of the folder of each training set, in a line for messages; docs/data.md has more."""

from __future__ import annotations

from collections.abc import Mapping

_PAIRS = '*.txt or *.jsonl with lines {"image", "caption"}, or *.tar of img2dataset'
_REGIONS = "or refs(unc).p with instances.json; train2014/"

LAYOUTS: Mapping[str, str] = {
    "mmc4": "docs_shard_*_v2.jsonl.zip or .jsonl; images/",
    "laion-coco": _PAIRS,
    "laion-en": _PAIRS,
    "cc12m": _PAIRS,
    "objects365": f"{_PAIRS}, with captions of your own",
    "llava-665k": "llava_v1_5_mix665k.json; coco/train2017/, gqa/images/, ocr_vqa/images/, "
    "textvqa/train_images/, vg/",
    "coco-caption": "coco_karpathy_train.json or captions_train2014.json; train2014/, val2014/",
    "vqav2": "v2_OpenEnded_mscoco_train2014_questions.json, "
    "v2_mscoco_train2014_annotations.json; train2014/",
    "chartqa": "train/train_human.json, train/train_augmented.json; train/png/",
    "docvqa": "train_v1.0_withQT.json; train/documents/",
    "infovqa": "infographicsVQA_train_v1.0.json; infographicsvqa_images/",
    "stvqa": "train_task_3.json; train_images/",
    "estvqa": "annotations/train.json; images/train/",
    "textcaps": "TextCaps_0.1_train.json; train_images/",
    "llavar": "llava_instruct_150k_llavar_16k.json; coco/train2017/",
    "ocrvqa": "dataset.json; images/",
    "dvqa": "train_qa.json; images/",
    "refcoco": f"refcoco_train.jsonl, {_REGIONS}",
    "refcoco+": f"refcoco+_train.jsonl, {_REGIONS}",
    "refcocog": "refcocog_train.jsonl, or refs(umd).p with instances.json; train2014/",
    "ade20k": "images/training/, annotations/training/, training.json with captions",
    "vist": "train_formatted.json or train.story-in-sequence.json; images/train_images/",
    "pororo": "descriptions.npy, img_cache4.npy, following_cache4.npy, train_seen_unseen_ids.npy, "
    "strips of frames",
    "flintstones": "flintstones_annotations_v1-0.json, train-val-test_split.json; "
    "video_frames_sampled/",
}
