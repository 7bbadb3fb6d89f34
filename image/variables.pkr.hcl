variable "image_version" {
  type        = string
  default     = "dev"
  description = "What the image is called; /version and the snapshot's label tell it."

  validation {
    condition     = can(regex("^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$", var.image_version))
    error_message = "The image_version must be 1 to 63 letters, digits, dots, dashes or underscores: it is a label."
  }
}

variable "model" {
  type        = string
  default     = "starter"
  description = "A name of service/models.json, or starter; with model_file, the name to report."

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9.-]{0,62}$", var.model))
    error_message = "The model must be a name of service/models.json such as llama-3-8b-instruct, or starter."
  }
}

variable "model_file" {
  type        = string
  default     = ""
  description = "A GGUF file of your own, which is uploaded instead of fetching the model."

  validation {
    condition     = var.model_file == "" || can(regex("^[A-Za-z0-9/._-]+[.]gguf$", var.model_file))
    error_message = "The model_file must be the path of a .gguf file, without blanks."
  }
}

variable "first_layer" {
  type        = string
  default     = "model"
  description = "The first layer to bake: model, base, stack or service."

  validation {
    condition     = contains(["model", "base", "stack", "service"], var.first_layer)
    error_message = "The first_layer must be model, base, stack or service."
  }
}

variable "last_layer" {
  type        = string
  default     = "service"
  description = "The last layer to bake; the snapshot of an inner layer is what a later bake starts from."

  validation {
    condition     = contains(["model", "base", "stack", "service"], var.last_layer)
    error_message = "The last_layer must be model, base, stack or service."
  }
}

variable "from_image" {
  type        = string
  default     = ""
  description = "Id of the snapshot to start from, which holds the layers before first_layer; empty for plain Debian."

  validation {
    condition     = can(regex("^[0-9]*$", var.from_image))
    error_message = "The from_image must be the id of a snapshot, a number."
  }
}

variable "location" {
  type        = string
  default     = "fsn1"
  description = "Where the baking server stands."
}

variable "server_type" {
  type        = string
  default     = "cx23"
  description = "Type of the baking server; its disk is the smallest that the image will fit on."
}

variable "run_id" {
  type        = string
  default     = "by-hand"
  description = "Names the baking server, so that what a killed run left can be told from all else."

  validation {
    condition     = can(regex("^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$", var.run_id))
    error_message = "The run_id must be 1 to 40 small letters, digits or dashes: it is part of a host's name."
  }
}

variable "snapshot_labels" {
  type        = map(string)
  default     = {}
  description = "Further labels of the snapshot."
}

variable "extra_ca_file" {
  type        = string
  default     = ""
  description = "A PEM file of certificate authorities to trust while baking, for networks that inspect TLS; not kept."
}

variable "pins_file" {
  type        = string
  default     = "pins.json"
  description = "What is pinned; another file, by its absolute path, is for registries of your own."
}
