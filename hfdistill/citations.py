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
    "touvron2021": """@inproceedings{touvron2021training,
  title = {Training data-efficient image transformers and distillation through attention},
  author = {Touvron, Hugo and Cord, Matthieu and Douze, Matthijs and Massa, Francisco
    and Sablayrolles, Alexandre and J{\\'e}gou, Herv{\\'e}},
  booktitle = {International Conference on Machine Learning},
  year = {2021}
}""",
    "sun2024": """@inproceedings{sun2024logit,
  title = {Logit Standardization in Knowledge Distillation},
  author = {Sun, Shangquan and Ren, Wenqi and Li, Jingzhi and Wang, Rui and Cao, Xiaochun},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2024}
}""",
    "zhao2022": """@inproceedings{zhao2022decoupled,
  title = {Decoupled Knowledge Distillation},
  author = {Zhao, Borui and Cui, Quan and Song, Renjie and Qiu, Yiyu and Liang, Jiajun},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2022}
}""",
    "huang2022": """@inproceedings{huang2022knowledge,
  title = {Knowledge Distillation from A Stronger Teacher},
  author = {Huang, Tao and You, Shan and Wang, Fei and Qian, Chen and Xu, Chang},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022}
}""",
    "hofstaetter2020": """@article{hofstatter2020improving,
  title = {Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation},
  author = {Hofst{\\"a}tter, Sebastian and Althammer, Sophia and Schr{\\"o}der, Michael and Sertkan, Mete and Hanbury, Allan},
  journal = {arXiv preprint arXiv:2010.02666},
  year = {2020}
}""",
    "romero2015": """@inproceedings{romero2015fitnets,
  title = {{FitNets}: Hints for Thin Deep Nets},
  author = {Romero, Adriana and Ballas, Nicolas and Kahou, Samira Ebrahimi and Chassang, Antoine and Gatta, Carlo and Bengio, Yoshua},
  booktitle = {International Conference on Learning Representations},
  year = {2015}
}""",
    "zagoruyko2017": """@inproceedings{zagoruyko2017paying,
  title = {Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via Attention Transfer},
  author = {Zagoruyko, Sergey and Komodakis, Nikos},
  booktitle = {International Conference on Learning Representations},
  year = {2017}
}""",
    "huang2017": """@article{huang2017like,
  title = {Like What You Like: Knowledge Distill via Neuron Selectivity Transfer},
  author = {Huang, Zehao and Wang, Naiyan},
  journal = {arXiv preprint arXiv:1707.01219},
  year = {2017}
}""",
    "kim2018": """@inproceedings{kim2018paraphrasing,
  title = {Paraphrasing Complex Network: Network Compression via Factor Transfer},
  author = {Kim, Jangho and Park, SeongUk and Kwak, Nojun},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2018}
}""",
    "yim2017": """@inproceedings{yim2017gift,
  title = {A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning},
  author = {Yim, Junho and Joo, Donggyu and Bae, Jihoon and Kim, Junmo},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2017}
}""",
    "ahn2019": """@inproceedings{ahn2019variational,
  title = {Variational Information Distillation for Knowledge Transfer},
  author = {Ahn, Sungsoo and Hu, Shell Xu and Damianou, Andreas and Lawrence, Neil D. and Dai, Zhenwen},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2019}
}""",
    "chen2021": """@inproceedings{chen2021distilling,
  title = {Distilling Knowledge via Knowledge Review},
  author = {Chen, Pengguang and Liu, Shu and Zhao, Hengshuang and Jia, Jiaya},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2021}
}""",
    "tung2019": """@inproceedings{tung2019similarity,
  title = {Similarity-Preserving Knowledge Distillation},
  author = {Tung, Frederick and Mori, Greg},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year = {2019}
}""",
    "park2019": """@inproceedings{park2019relational,
  title = {Relational Knowledge Distillation},
  author = {Park, Wonpyo and Kim, Dongju and Lu, Yan and Cho, Minsu},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2019}
}""",
    "peng2019": """@inproceedings{peng2019correlation,
  title = {Correlation Congruence for Knowledge Distillation},
  author = {Peng, Baoyun and Jin, Xiao and Liu, Jiaheng and Zhou, Shunfeng and Wu, Yichao and Liu, Yu and Li, Dongsheng and Zhang,
    Zhaoning},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year = {2019}
}""",
    "passalis2018": """@inproceedings{passalis2018learning,
  title = {Learning Deep Representations with Probabilistic Knowledge Transfer},
  author = {Passalis, Nikolaos and Tefas, Anastasios},
  booktitle = {Proceedings of the European Conference on Computer Vision},
  year = {2018}
}""",
    "liu2019": """@inproceedings{liu2019knowledge,
  title = {Knowledge Distillation via Instance Relationship Graph},
  author = {Liu, Yufan and Cao, Jiajiong and Li, Bing and Yuan, Chunfeng and Hu, Weiming and Li, Yangxi and Duan, Yunqiang},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2019}
}""",
    "chen2018": """@inproceedings{chen2018darkrank,
  title = {{DarkRank}: Accelerating Deep Metric Learning via Cross Sample Similarities Transfer},
  author = {Chen, Yuntao and Wang, Naiyan and Zhang, Zhaoxiang},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year = {2018}
}""",
    "oord2018": """@article{oord2018representation,
  title = {Representation Learning with Contrastive Predictive Coding},
  author = {van den Oord, Aaron and Li, Yazhe and Vinyals, Oriol},
  journal = {arXiv preprint arXiv:1807.03748},
  year = {2018}
}""",
    "tian2020": """@inproceedings{tian2020contrastive,
  title = {Contrastive Representation Distillation},
  author = {Tian, Yonglong and Krishnan, Dilip and Isola, Phillip},
  booktitle = {International Conference on Learning Representations},
  year = {2020}
}""",
    "fang2021": """@inproceedings{fang2021seed,
  title = {{SEED}: Self-supervised Distillation For Visual Representation},
  author = {Fang, Zhiyuan and Wang, Jianfeng and Wang, Lijuan and Zhang, Lei and Yang, Yezhou and Liu, Zicheng},
  booktitle = {International Conference on Learning Representations},
  year = {2021}
}""",
    "gu2023": """@inproceedings{gu2024minillm,
  title = {{MiniLLM}: Knowledge Distillation of Large Language Models},
  author = {Gu, Yuxian and Dong, Li and Wei, Furu and Huang, Minlie},
  booktitle = {International Conference on Learning Representations},
  year = {2024}
}""",
    "agarwal2023": """@inproceedings{agarwal2024onpolicy,
  title = {On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes},
  author = {Agarwal, Rishabh and Vieillard, Nino and Zhou, Yongchao and Stanczyk, Piotr and Ramos, Sabela and Geist, Matthieu and
    Bachem, Olivier},
  booktitle = {International Conference on Learning Representations},
  year = {2024}
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
    "hard_targets": ("touvron2021",),
    "standardized_soft_targets": ("sun2024",),
    "decoupled": ("zhao2022",),
    "dist": ("huang2022",),
    "margin_mse": ("hofstaetter2020",),
    "hint": ("romero2015",),
    "attention_transfer": ("zagoruyko2017",),
    "nst": ("huang2017",),
    "factor_transfer": ("kim2018",),
    "fsp": ("yim2017",),
    "vid": ("ahn2019",),
    "review": ("chen2021",),
    "hcl": ("chen2021",),
    "similarity_preserving": ("tung2019",),
    "rkd_distance": ("park2019",),
    "rkd_angle": ("park2019",),
    "correlation_congruence": ("peng2019",),
    "pkt": ("passalis2018",),
    "similarity_kl": ("fang2021",),
    "instance_graph": ("liu2019",),
    "dark_rank": ("chen2018",),
    "crd": ("tian2020",),
    "info_nce": (
        "oord2018",
        "tian2020",
    ),
    "reverse_kl": ("gu2023",),
    "jsd": ("agarwal2023",),
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
