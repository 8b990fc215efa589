"""The networks of the coverage table: name -> how to build it, with random weights, and the inputs it is called with.

Needs `pip install torchvision timm transformers ultralytics` beside the development environment. torchvision's compiled
operators are absent beside the CPU build of torch, so the two that its import looks for are declared first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if not hasattr(torch.ops.torchvision, "nms"):
    _DECLARED = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _DECLARED.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

Inputs = tuple[Tensor, ...] | Mapping[str, Tensor]
LARGER = {"inception_v3": 128, "maxvit_t": 224, "swin_v2_t": 256, "swin_v2_s": 256, "swin_v2_b": 256}
LARGER |= {"swin_t": 224, "swin_s": 224, "swin_b": 224}  # else 64 px
VITS = {"vit_b_16": 64, "vit_b_32": 64, "vit_l_16": 64, "vit_l_32": 64, "vit_h_14": 56}

TIMM = """
resnet18 resnet26d resnext50_32x4d seresnet50 skresnet18 ecaresnet26t resnest14d res2net50_26w_4s resnetv2_50
wide_resnet50_2 regnetx_002 regnety_002 efficientnet_b0 efficientnet_lite0 efficientnetv2_rw_t mobilenetv2_100
mobilenetv3_small_100 mobilenetv4_conv_small mnasnet_100 fbnetc_100 spnasnet_100 ghostnet_100 ghostnetv2_100
hardcorenas_a tinynet_a lcnet_050 rexnet_100 mixnet_s dla34 dpn48b densenet121 vgg11_bn inception_v3 inception_v4
inception_resnet_v2 xception41 nasnetalarge pnasnet5large hrnet_w18_small cspresnet50 cspdarknet53 darknet53
selecsls42b ese_vovnet19b_dw repvgg_a0 mobileone_s0 fastvit_t8 convnext_atto convnextv2_atto convmixer_768_32
poolformer_s12 mixer_s32_224 gmlp_s16_224 resmlp_12_224 vit_tiny_patch16_224 deit_tiny_patch16_224
deit3_small_patch16_224 cait_xxs24_224 xcit_nano_12_p16_224 levit_128s swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
twins_pcpvt_small pvt_v2_b0 coat_tiny crossvit_tiny_240 pit_ti_224 tnt_s_patch16_224 visformer_tiny volo_d1_224
beit_base_patch16_224 eva02_tiny_patch14_224 maxvit_nano_rw_256 coatnet_nano_rw_224 mobilevit_xxs mobilevitv2_050
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_m0 focalnet_tiny_srf davit_tiny
nextvit_small repvit_m0_9 tiny_vit_5m_224 hiera_tiny_224 inception_next_tiny caformer_s18 starnet_s1 dm_nfnet_f0
nf_regnet_b0 eca_nfnet_l0 lambda_resnet26t halonet26t botnet26t_256 sequencer2d_s rdnet_tiny gernet_s
""".split()


@dataclass(frozen=True)
class Network:
    """family: the package, or "own". build and inputs are called in a process of their own."""

    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]


def image(size: int, channels: int = 3) -> Callable[[], Inputs]:
    return lambda: (torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0)),)


def words(length: int = 16, vocabulary: int = 1000) -> Tensor:
    return torch.randint(3, vocabulary, (2, length), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------- packages


def _torchvision(name: str) -> nn.Module:
    import torchvision

    if name in VITS:
        return torchvision.models.get_model(name, weights=None, image_size=VITS[name])
    settings = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **settings)


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)


def _timm_inputs(name: str) -> Inputs:
    import timm

    size = timm.models.get_pretrained_cfg(name).input_size[-1]
    return image(size)()


def _transformers(name: str, config: str, **settings: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, config)(**settings)
    return getattr(transformers, name)(made)


def _yolo(name: str) -> nn.Module:
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel(f"{name}.yaml", verbose=False)


def _deeplab() -> nn.Module:
    import torchvision

    return torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None)


# ------------------------------------------------------------------------------------------------------------------ own


def conv(i: int, o: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class UNet(nn.Module):
    """Ronneberger et al., 2015, three levels deep."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = [width * 2**i for i in range(4)]
        self.downs = nn.ModuleList(nn.Sequential(conv(i, o), conv(o, o)) for i, o in zip([3, *w[:3]], w, strict=True))
        self.lifts = nn.ModuleList(nn.ConvTranspose2d(w[i + 1], w[i], 2, 2) for i in (2, 1, 0))
        self.ups = nn.ModuleList(nn.Sequential(conv(2 * w[i], w[i]), conv(w[i], w[i])) for i in (2, 1, 0))
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for down in self.downs:
            skips.append(down(F.max_pool2d(skips[-1], 2) if skips else x))
        x = skips.pop()
        for lift, up in zip(self.lifts, self.ups, strict=True):
            x = up(torch.cat([skips.pop(), lift(x)], 1))
        return self.out(x)


class SSD(nn.Module):
    """Two heads at three scales, permuted, flattened and concatenated, as Liu et al., 2016."""

    def __init__(self, classes: int = 4, anchors: int = 3) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(conv(3, 16, 2), conv(16, 32, 2)), conv(32, 48, 2), conv(48, 64, 2)])
        self.boxes = nn.ModuleList(nn.Conv2d(c, anchors * 4, 3, padding=1) for c in (32, 48, 64))
        self.scores = nn.ModuleList(nn.Conv2d(c, anchors * classes, 3, padding=1) for c in (32, 48, 64))
        self.classes = classes

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        boxes, scores = [], []
        for stage, box, score in zip(self.stages, self.boxes, self.scores, strict=True):
            x = stage(x)
            boxes.append(box(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4))
            scores.append(score(x).permute(0, 2, 3, 1).reshape(len(x), -1, self.classes))
        return {"boxes": torch.cat(boxes, 1), "scores": torch.cat(scores, 1)}


class Recurrent(nn.Module):
    """A text classifier; the last step of each direction is read."""

    def __init__(self, kind: str, **settings: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 32)
        self.rnn = getattr(nn, kind)(32, 48, batch_first=True, **settings)
        out = settings.get("proj_size", 48) * (2 if settings.get("bidirectional") else 1)
        self.head = nn.Sequential(nn.Linear(out, 24), nn.ReLU(), nn.Linear(24, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0].mean(1))


class SuperResolution(nn.Sequential):
    """ESPCN (Shi et al., 2016)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 64, 5, padding=2),
            nn.Tanh(),
            nn.Conv2d(64, 32, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(32, 3 * 9, 3, padding=1),
            nn.PixelShuffle(3),
        )


class AutoEncoder(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            conv(3, 16, 2),
            conv(16, 32, 2),
            nn.ConvTranspose2d(32, 16, 2, 2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 3, 2, 2),
        )


class DenseAutoEncoder(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(784, 128),
            nn.ReLU(),
            nn.Linear(128, 32),
            nn.ReLU(),
            nn.Linear(32, 128),
            nn.ReLU(),
            nn.Linear(128, 784),
            nn.Unflatten(1, (1, 28, 28)),
        )


class TransformerEncoder(nn.Module):
    """PyTorch's own layers, over words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


def _own() -> dict[str, Network]:
    made = {
        "unet": Network("own", UNet, image(32)),
        "ssd_heads": Network("own", SSD, image(64)),
        "espcn": Network("own", SuperResolution, image(24)),
        "auto_encoder": Network("own", AutoEncoder, image(32)),
        "dense_auto_encoder": Network("own", DenseAutoEncoder, image(28, 1)),
        "transformer_encoder": Network("own", TransformerEncoder, lambda: (words(),)),
    }
    recurrent: dict[str, tuple[str, dict[str, Any]]] = {
        "lstm": ("LSTM", {}),
        "lstm_two_layers": ("LSTM", {"num_layers": 2}),
        "lstm_bidirectional": ("LSTM", {"num_layers": 2, "bidirectional": True}),
        "lstm_projected": ("LSTM", {"proj_size": 24}),
        "gru": ("GRU", {}),
        "gru_bidirectional": ("GRU", {"num_layers": 2, "bidirectional": True}),
    }
    for name, (kind, settings) in recurrent.items():
        made[name] = Network("own", functools.partial(Recurrent, kind, **settings), lambda: (words(),))
    return made


def _language() -> dict[str, Network]:
    def tokens() -> Inputs:
        found = words()
        return {"input_ids": found, "attention_mask": torch.ones_like(found)}

    def speech() -> Inputs:
        mel = torch.randn(2, 80, 64, generator=torch.Generator().manual_seed(0))
        return {"input_features": mel, "decoder_input_ids": words(8)}

    def translated() -> Inputs:
        return {"input_ids": words(), "decoder_input_ids": words(8)}

    build = functools.partial
    whisper = {"max_source_positions": 32, "d_model": 384, "encoder_layers": 4, "decoder_layers": 4}
    whisper |= {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
    whisper |= {"encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536, "use_cache": False}
    made = {
        "bert": (build(_transformers, "BertForSequenceClassification", "BertConfig"), tokens),
        "distilbert": (build(_transformers, "DistilBertForSequenceClassification", "DistilBertConfig"), tokens),
        "gpt2": (build(_transformers, "GPT2LMHeadModel", "GPT2Config", use_cache=False), tokens),
        "t5": (build(_transformers, "T5ForConditionalGeneration", "T5Config", use_cache=False), translated),
        "whisper_tiny": (build(_transformers, "WhisperForConditionalGeneration", "WhisperConfig", **whisper), speech),
        "roberta": (build(_transformers, "RobertaForSequenceClassification", "RobertaConfig"), tokens),
        "minilm": (
            build(
                _transformers,
                "BertModel",
                "BertConfig",
                hidden_size=384,
                num_hidden_layers=6,
                num_attention_heads=12,
                intermediate_size=1536,
            ),
            tokens,
        ),
        "llama_small": (
            build(
                _transformers,
                "LlamaForCausalLM",
                "LlamaConfig",
                vocab_size=1000,
                hidden_size=256,
                num_hidden_layers=4,
                num_attention_heads=8,
                num_key_value_heads=4,
                intermediate_size=688,
                use_cache=False,
            ),
            tokens,
        ),
        "hf_vit": (build(_transformers, "ViTForImageClassification", "ViTConfig", image_size=64), image(64)),
        "hf_deit": (build(_transformers, "DeiTForImageClassification", "DeiTConfig", image_size=64), image(64)),
        "hf_swin": (build(_transformers, "SwinForImageClassification", "SwinConfig"), image(224)),
        "hf_convnext": (build(_transformers, "ConvNextForImageClassification", "ConvNextConfig"), image(64)),
    }
    return {name: Network("transformers", *made_of) for name, made_of in made.items()}


def networks() -> dict[str, Network]:
    """All of them; torchvision's list is that of the version installed."""
    import torchvision

    found = _own() | _language()
    for name in torchvision.models.list_models(module=torchvision.models):
        size = VITS.get(name, LARGER.get(name, 64))
        found[f"torchvision/{name}"] = Network("torchvision", functools.partial(_torchvision, name), image(size))
    for name in TIMM:
        found[f"timm/{name}"] = Network("timm", functools.partial(_timm, name), functools.partial(_timm_inputs, name))
    for name in ("yolov8n", "yolo11n"):
        found[name] = Network("ultralytics", functools.partial(_yolo, name), image(64))
    found["deeplabv3_mobilenet"] = Network("torchvision", _deeplab, image(64))
    return found
