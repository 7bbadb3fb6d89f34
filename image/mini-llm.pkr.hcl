# The image: one server that bakes, the layers asked for, one snapshot.

packer {
  required_version = ">= 1.11.0"

  required_plugins {
    hcloud = {
      source  = "github.com/hetznercloud/hcloud"
      version = ">= 1.0.5"
    }
  }
}

locals {
  pins = jsondecode(file(var.pins_file)) # this function alone looks beside the template by itself

  # From the rarest to change to the most frequent; each needs those before it.
  all_layers = ["model", "base", "stack", "service"]
  first      = index(local.all_layers, var.first_layer)
  last       = index(local.all_layers, var.last_layer)
  layers     = slice(local.all_layers, local.first, local.last + 1)

  # The service's layer fetches nothing, so it alone needs nobody to trust.
  extra_ca_file = var.first_layer == "service" ? "" : var.extra_ca_file

  # Where the baking server keeps what is uploaded; not /tmp, which is memory.
  uploads = "/var/tmp"
}

source "hcloud" "node" {
  image          = var.from_image == "" ? local.pins.base_image : var.from_image
  location       = var.location
  server_type    = var.server_type
  server_name    = "mini-llm-bake-${var.run_id}"
  ssh_username   = "root"
  user_data_file = "${path.root}/../cloud-init/bake.yaml"

  # The plugin refuses a name that is there already, and a layer may have to be baked again.
  snapshot_name = "mini-llm ${var.image_version}, ${var.model}, up to layer ${var.last_layer}, run ${var.run_id}"
  snapshot_labels = merge({
    product = "mini-llm"
    version = var.image_version
    layer   = var.last_layer
    run     = var.run_id
  }, var.snapshot_labels)
}

build {
  name    = "mini-llm"
  sources = ["source.hcloud.node"]

  provisioner "shell" {
    inline           = ["cloud-init status --wait --long"]
    valid_exit_codes = [0, 2] # 2: done, with something to complain about, such as a data source of its own
  }

  provisioner "file" {
    sources = concat(
      ["${path.root}/provision", "${path.root}/rootfs", "${path.root}/../service", "${path.root}/../cloud-init"],
      compact([var.model_file, local.extra_ca_file]),
    )
    destination = "${local.uploads}/"
  }

  provisioner "shell" {
    scripts = concat(
      ["${path.root}/provision/begin.sh"],
      [for layer in local.layers : "${path.root}/provision/${layer}.sh"],
      ["${path.root}/provision/seal.sh"],
    )
    environment_vars = [
      "UPLOADS=${local.uploads}",
      "IMAGES=${join(" ", [for name, pin in local.pins.images : "${name}=${pin.image}@${pin.digest}"])}",
      "CONTAINERS=${jsonencode(local.pins.images)}",
      "IMAGE_VERSION=${var.image_version}",
      "MODEL=${var.model_file == "" ? var.model : "${local.uploads}/${basename(var.model_file)}"}",
      "MODEL_NAME=${var.model}",
      "EXTRA_CA=${local.extra_ca_file == "" ? "" : "${local.uploads}/${basename(local.extra_ca_file)}"}",
      "DEBIAN_FRONTEND=noninteractive",
    ]
  }
}
