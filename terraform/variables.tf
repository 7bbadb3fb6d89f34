variable "image_id" {
  type        = number
  description = "Id of the snapshot to launch; `bake.py promote` writes it to image.auto.tfvars.json."

  validation {
    condition     = var.image_id > 0 && floor(var.image_id) == var.image_id
    error_message = "The image_id must be the id of a snapshot: make bake, or bake.py promote ID, writes it."
  }
}

variable "image_version" {
  type        = string
  default     = null
  description = "What that snapshot is called, for the output; `bake.py promote` writes it beside the id."
}

variable "domain" {
  type        = string
  description = "The name that the service is reached by; its address records, and those of monitoring.<domain>, point to the addresses in the outputs (dns_zone makes them)."

  validation {
    condition     = can(regex("^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?[.])+[a-z]([a-z0-9-]{0,61}[a-z0-9])?$", var.domain))
    error_message = "The domain must be a name such as llm.example.org, in small letters."
  }
}

variable "dns_zone" {
  type        = string
  default     = null
  description = "Zone of the same project, in primary mode, that the domain is in: its address records are made there. Null where they are made by hand."

  validation {
    condition     = var.dns_zone == null || try(var.domain == var.dns_zone || endswith(var.domain, ".${var.dns_zone}"), false)
    error_message = "The domain must be the dns_zone or a name in it: llm.example.org is in example.org."
  }
}

variable "acme" {
  type = object({
    email     = string
    server    = optional(string)
    challenge = optional(string)
    authority = optional(string)
  })
  default     = null
  description = "Who hears of the certificate that is ordered, and where if not at Let's Encrypt; null with a certificate of your own."

  validation {
    condition     = var.acme == null || can(regex("^[^@ ]+@[^@ ]+[.][^@ ]+$", var.acme.email))
    error_message = "The acme.email must be an e-mail address."
  }
}

variable "certificate" {
  type        = object({ chain = string, key = string })
  default     = null
  sensitive   = true
  description = "A certificate of your own for domain and monitoring.<domain>, and its key, as PEM, instead of an order."
}

variable "api_keys" {
  type = list(object({
    name    = string
    sha256  = string
    scopes  = optional(list(string))
    expires = optional(string)
    limits = optional(object({
      requests_per_minute = optional(number)
      tokens_per_day      = optional(number)
      parallel            = optional(number)
    }))
  }))
  description = "Who may use the service: names, and the SHA-256 of their keys."

  validation {
    condition     = length(var.api_keys) > 0 && alltrue([for key in var.api_keys : can(regex("^[0-9a-f]{64}$", key.sha256))])
    error_message = "There must be at least one of the api_keys, each with the SHA-256 of a key: 64 hexadecimal digits."
  }

  validation {
    condition     = length(distinct([for key in var.api_keys : key.name])) == length(var.api_keys)
    error_message = "Two of the api_keys have the same name."
  }

  validation {
    condition     = !contains([for key in var.api_keys : key.name], "proof")
    error_message = "The name proof is taken, by the key that a new node is proved with."
  }
}

variable "handover" {
  type        = object({ certificate = string, key = string, take_over = optional(bool, true) })
  default     = null
  sensitive   = true
  description = "By what the nodes of this deployment know each other, from `make handover-key`. Without it a rollout cuts answers in flight, orders another certificate and loses counters, audit log and history; with take_over = false one does so on purpose, to change the key or to leave a broken node behind."
}

variable "monitoring" {
  type        = object({ user = string, password_hash = string })
  default     = null
  description = "Who may see monitoring.<domain>; the hash is what `openssl passwd -apr1` makes of a random password."
}

variable "alerts" {
  type = object({
    webhook  = optional(string)
    watchdog = optional(string)
    mail = optional(object({
      to        = string
      from      = string
      smarthost = string
      username  = optional(string)
      password  = optional(string)
    }))
  })
  default     = null
  sensitive   = true
  description = "Who hears of alerts: a webhook, mail, or both."
}

variable "price_eur_per_hour" {
  type        = number
  default     = null
  description = "What the server costs an hour, for the cost metric."
}

variable "ssh_public_keys" {
  type        = map(string)
  default     = {}
  description = "Who may log in as root, by name; a key that the project has already goes into existing_ssh_keys. Without any of both, nobody can, and Hetzner mails a password that does not work."

  validation {
    condition     = alltrue([for key in values(var.ssh_public_keys) : can(regex("^[a-z0-9@.-]+ [A-Za-z0-9+/]+={0,2}( .*)?$", trimspace(key)))])
    error_message = "The ssh_public_keys must each be one line as in ~/.ssh/id_ed25519.pub: ssh-ed25519 AAAA… and perhaps a comment."
  }

  validation {
    condition     = length(distinct([for key in values(var.ssh_public_keys) : join(" ", slice(concat(split(" ", trimspace(key)), [""]), 0, 2))])) == length(var.ssh_public_keys)
    error_message = "Two of the ssh_public_keys are the same key."
  }
}

variable "existing_ssh_keys" {
  type        = set(string)
  default     = []
  description = "Names of keys that the project has already, who may log in as root as well; they stay when the deployment goes."
}

variable "ssh_sources" {
  type        = list(string)
  default     = ["0.0.0.0/0", "::/0"]
  description = "From where SSH is let in, as networks; an empty list lets it in from nowhere."

  validation {
    condition     = alltrue([for source in var.ssh_sources : can(cidrhost(source, 0))])
    error_message = "The ssh_sources must be networks such as 203.0.113.7/32."
  }
}

variable "name" {
  type        = string
  default     = "mini-llm"
  description = "What everything of this deployment is called at the cloud, and what it is told apart by from another one."

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,30}[a-z0-9]$", var.name))
    error_message = "The name must be 2 to 32 small letters, digits or dashes: it is part of a host's name."
  }
}

variable "server_type" {
  type        = string
  default     = "cx23"
  description = "Type of the node; its memory must hold the model."
}

variable "location" {
  type        = string
  default     = "fsn1"
  description = "Where the node stands, in Europe; its addresses stay at home where they were made first."
}

variable "network" {
  type        = string
  default     = "10.77.0.0/24"
  description = "The private network of the deployment's nodes. It cannot be changed once it is there: for another one, destroy and apply."

  validation {
    condition     = can(cidrhost(var.network, 1000)) == false && can(cidrhost(var.network, 2))
    error_message = "The network must be one such as 10.77.0.0/24; of more than a /22 a new node would not look through."
  }
}

variable "protect_address" {
  type        = bool
  default     = true
  description = "Keeps the addresses from being deleted, by destroy as well: whoever has them next gets your clients. Apply with false before you give them up."
}

variable "ready_timeout_s" {
  type        = number
  default     = 900
  description = "How long a new node may take to prove itself before the apply fails and the old node stays."
}

variable "proof_authority" {
  type        = string
  default     = ""
  description = "PEM file of the authority that the certificate is trusted by, where the system does not know it."
}

variable "python" {
  type        = string
  default     = "../.venv/bin/python"
  description = "The Python that proves new nodes, seen from this folder; `make bake` sets it up."
}
