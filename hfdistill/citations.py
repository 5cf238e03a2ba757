"""Which paper stands behind which loss."""

from __future__ import annotations

import re
from collections.abc import Iterable


PAPERS = {
    "hinton2015": """@article{hinton2015distilling,
  title = {Distilling the Knowledge in a Neural Network},
  author = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  journal = {arXiv preprint arXiv:1503.02531},
  year = {2015}
}""",
    "kim2021": """@inproceedings{kim2021comparing,
  title = {Comparing {Kullback-Leibler} Divergence and Mean Squared Error Loss in Knowledge Distillation},
  author = {Kim, Taehyeon and Oh, Jaehoon and Kim, NakYil and Cho, Sangwook and Yun, Se-Young},
  booktitle = {Proceedings of the Thirtieth International Joint Conference on Artificial Intelligence},
  year = {2021}
}""",
    "ba2014": """@inproceedings{ba2014deep,
  title = {Do Deep Nets Really Need to be Deep?},
  author = {Ba, Lei Jimmy and Caruana, Rich},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2014}
}""",
    "sanh2019": """@article{sanh2019distilbert,
  title = {{DistilBERT}, a distilled version of {BERT}: smaller, faster, cheaper and lighter},
  author = {Sanh, Victor and Debut, Lysandre and Chaumond, Julien and Wolf, Thomas},
  journal = {arXiv preprint arXiv:1910.01108},
  year = {2019}
}""",
    "jiao2020": """@inproceedings{jiao2020tinybert,
  title = {{TinyBERT}: Distilling {BERT} for Natural Language Understanding},
  author = {Jiao, Xiaoqi and Yin, Yichun and Shang, Lifeng and Jiang, Xin and Chen, Xiao and Li, Linlin and Wang, Fang and Liu, Qun},
  booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2020},
  year = {2020}
}""",
    "wang2020": """@inproceedings{wang2020minilm,
  title = {{MiniLM}: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers},
  author = {Wang, Wenhui and Wei, Furu and Dong, Li and Bao, Hangbo and Yang, Nan and Zhou, Ming},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020}
}""",
    "wang2021": """@inproceedings{wang2021minilmv2,
  title = {{MiniLMv2}: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers},
  author = {Wang, Wenhui and Bao, Hangbo and Huang, Shaohan and Dong, Li and Wei, Furu},
  booktitle = {Findings of the Association for Computational Linguistics: ACL-IJCNLP 2021},
  year = {2021}
}""",
    "sun2019": """@inproceedings{sun2019patient,
  title = {Patient Knowledge Distillation for {BERT} Model Compression},
  author = {Sun, Siqi and Cheng, Yu and Gan, Zhe and Liu, Jingjing},
  booktitle = {Proceedings of the 2019 Conference on Empirical Methods in Natural Language Processing and the 9th International
    Joint Conference on Natural Language Processing},
  year = {2019}
}""",
    "sun2020": """@inproceedings{sun2020mobilebert,
  title = {{MobileBERT}: a Compact Task-Agnostic {BERT} for Resource-Limited Devices},
  author = {Sun, Zhiqing and Yu, Hongkun and Song, Xiaodan and Liu, Renjie and Yang, Yiming and Zhou, Denny},
  booktitle = {Proceedings of the 58th Annual Meeting of the Association for Computational Linguistics},
  year = {2020}
}""",
    "chen2020": """@inproceedings{chen2020simple,
  title = {A Simple Framework for Contrastive Learning of Visual Representations},
  author = {Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey},
  booktitle = {Proceedings of the 37th International Conference on Machine Learning},
  year = {2020}
}""",
    "yang2020": """@inproceedings{yang2020textbrewer,
  title = {{TextBrewer}: An Open-Source Knowledge Distillation Toolkit for Natural Language Processing},
  author = {Yang, Ziqing and Cui, Yiming and Chen, Zhipeng and Che, Wanxiang and Liu, Ting and Wang, Shijin and Hu, Guoping},
  booktitle = {Proceedings of the 58th Annual Meeting of the Association for Computational Linguistics: System Demonstrations},
  year = {2020}
}""",
}

LOSS_PAPERS = {
    "soft_targets": ("hinton2015",),
    "binary_soft_targets": ("hinton2015",),
    "regression_mse": (),
    "logit_mse": ("ba2014", "kim2021"),
    "hidden_mse": ("jiao2020",),
    "cosine": ("sanh2019",),
    "contrastive_pairs": ("chen2020",),
    "embedding_mse": ("jiao2020",),
    "attention_score_mse": ("jiao2020",),
    "attention_kl": ("wang2020",),
    "attention_mse": ("yang2020",),
    "relation_kl": ("wang2020", "wang2021"),
    "patient": ("sun2019",),
    "normalized_hidden_mse": ("sun2020",),
    "hidden_moments": ("sun2020",),
}
"""Name of a loss -> its papers. The task loss has none."""


def citations_for(losses: Iterable[str]) -> list[str]:
    """BibTeX entries of the papers behind some losses, each once, in the order of the losses.

    Args:
        losses (iterable of `str`): names (`hidden_mse`) or classes (`HiddenMSELoss`); those without a paper give nothing.

    Example:
        >>> [entry.split("{")[1].split(",")[0] for entry in citations_for(["task", "SoftTargetsLoss", "hidden_mse", "embedding_mse"])]
        ['hinton2015distilling', 'jiao2020tinybert']
    """
    papers = (paper for loss in losses for paper in LOSS_PAPERS.get(_registered_name(loss), ()))
    return [PAPERS[paper] for paper in dict.fromkeys(papers)]


def _registered_name(loss: str) -> str:
    """`AttentionKLLoss` -> `attention_kl`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", loss.removesuffix("Loss")).lower()
