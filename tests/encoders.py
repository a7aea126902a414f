"""SpeechBrain's speaker encoders at toy size, and folders laid out as those on the Hub.

``write_published`` mirrors the files of speechbrain/spkrec-ecapa-voxceleb, spkrec-resnet-voxceleb and
spkrec-xvect-voxceleb, whose YAMLs name their own repository as the place of the weights.
"""

import torch
from hyperpyyaml import load_hyperpyyaml

ENCODERS = {
    "ecapa": """
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: !ref <n_mels>
    channels: [16, 16, 16, 16, 48]
    kernel_sizes: [5, 3, 3, 3, 1]
    dilations: [1, 2, 3, 4, 1]
    attention_channels: 8
    lin_neurons: !ref <emb_dim>

classifier: !new:speechbrain.lobes.models.ECAPA_TDNN.Classifier
    input_size: !ref <emb_dim>
    out_neurons: !ref <out_n_neurons>
""",
    "resnet": """
embedding_model: !new:speechbrain.lobes.models.ResNet.ResNet
    input_size: !ref <n_mels>
    channels: [4, 4, 8, 8]
    strides: [1, 2, 2, 2]
    block_sizes: [1, 1, 1, 1]
    lin_neurons: !ref <emb_dim>

classifier: !new:speechbrain.lobes.models.ResNet.Classifier
    input_size: !ref <emb_dim>
    out_neurons: !ref <out_n_neurons>
""",
    "xvect": """
embedding_model: !new:speechbrain.lobes.models.Xvector.Xvector
    in_channels: !ref <n_mels>
    activation: !name:torch.nn.LeakyReLU
    tdnn_blocks: 5
    tdnn_channels: [16, 16, 16, 16, 24]
    tdnn_kernel_sizes: [5, 3, 3, 1, 1]
    tdnn_dilations: [1, 2, 3, 1, 1]
    lin_neurons: !ref <emb_dim>

classifier: !new:speechbrain.lobes.models.Xvector.Classifier
    input_shape: [null, null, !ref <emb_dim>]
    activation: !name:torch.nn.LeakyReLU
    lin_blocks: 1
    lin_neurons: !ref <emb_dim>
    out_neurons: !ref <out_n_neurons>
""",
}
SIZES = {"ecapa": (24, 24), "resnet": (16, 32), "xvect": (24, 40)}  # n_mels, dimensions
BEFORE = """
n_mels: {n_mels}
emb_dim: {emb_dim}
pretrained_path: speechbrain/spkrec-{kind}-voxceleb
out_n_neurons: 5

compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: !ref <n_mels>

mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
"""
AFTER = """
mean_var_norm_emb: !new:speechbrain.processing.features.InputNormalization
    norm_type: global
    std_norm: False

modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    embedding_model: !ref <embedding_model>
    mean_var_norm_emb: !ref <mean_var_norm_emb>
    classifier: !ref <classifier>

label_encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder

pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        embedding_model: !ref <embedding_model>
        mean_var_norm_emb: !ref <mean_var_norm_emb>
        classifier: !ref <classifier>
        label_encoder: !ref <label_encoder>
    paths:
        embedding_model: !ref <pretrained_path>/embedding_model.ckpt
        mean_var_norm_emb: !ref <pretrained_path>/mean_var_norm_emb.ckpt
        classifier: !ref <pretrained_path>/classifier.ckpt
        label_encoder: !ref <pretrained_path>/label_encoder.txt
"""


def hyperparams(kind):
    """The text of a published hyperparams.yaml."""
    n_mels, emb_dim = SIZES[kind]
    return BEFORE.format(kind=kind, n_mels=n_mels, emb_dim=emb_dim) + ENCODERS[kind] + AFTER


def parts(kind, seed=0):
    """``compute_features``, ``mean_var_norm`` and ``embedding_model``; no BatchNorm is the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = load_hyperpyyaml(hyperparams(kind))
        for module in made["embedding_model"].modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2.0)
    return {name: made[name] for name in ("compute_features", "mean_var_norm", "embedding_model")}


def write_published(folder, kind):
    """A folder as SpeechBrain's own on the Hub, random weights in it; returns its path."""
    folder.mkdir(parents=True)
    (folder / "hyperparams.yaml").write_text(hyperparams(kind))
    made = load_hyperpyyaml(hyperparams(kind))
    torch.save(parts(kind)["embedding_model"].state_dict(), folder / "embedding_model.ckpt")
    torch.save(made["classifier"].state_dict(), folder / "classifier.ckpt")
    norm = made["mean_var_norm_emb"]
    norm(torch.randn(4, 1, SIZES[kind][1]), torch.ones(4))
    norm._save(folder / "mean_var_norm_emb.ckpt")
    made["label_encoder"].update_from_iterable(f"id{n}" for n in range(5))
    made["label_encoder"].save(folder / "label_encoder.txt")
    return folder
