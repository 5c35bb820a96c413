"""The narrowest networks, on images of 64 pixels: settings of runs that are about something else than what they learn."""

NARROW = " ".join(
    [
        "--data.image_size 64 --data.store_size 64",
        "--model.backbone resnet18 --model.width 8 --model.fpn_width 32 --model.latent 16",
    ]
)
