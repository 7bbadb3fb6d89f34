terraform {
  required_version = ">= 1.9.0" # also OpenTofu

  required_providers {
    hcloud = {
      source  = "hetznercloud/hcloud"
      version = "1.68.0"
    }
  }
}

# The token comes from HCLOUD_TOKEN; nothing secret of the account stands in a file.
provider "hcloud" {}
