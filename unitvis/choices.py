"""What options may be, for the modules that check them and for the command line, which tells them without PyTorch."""

MODEL_FORMS = "torchvision:NAME, timm:NAME, file.py:function or package.module:function"
PRECISIONS = ("exact", "fp32", "fp16", "bf16")
UNITS = ("channel", "neuron")
DECODERS = ("pillow", "simplejpeg")
CROPS = ("rf", "effective", "image")
PROJECTIONS = ("deconvnet", "guided")
FIGURES = ("lecture", "paper")
CHECKPOINT_SECONDS = 60.0  # between two checkpoints, if no other number is given
