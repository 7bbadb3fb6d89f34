# Copy this beside main.tf, with the bucket's name and place: the state then lies in Hetzner's object storage, and its lock
# beside it, so that two people do not apply at once. Terraform 1.11 or OpenTofu 1.10 and newer.
#
#   export AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=…        # the bucket's S3 credentials, from Hetzner's console
#   cp terraform/examples/object_storage.tf terraform/
#   terraform -chdir=terraform init -migrate-state            # takes over a state that is there
#
# The bucket must be private, and keep versions: whoever reads it has the keys that are in the state.

terraform {
  backend "s3" {
    bucket       = "mini-llm-state"
    key          = "mini-llm/terraform.tfstate"
    region       = "fsn1"
    endpoints    = { s3 = "https://fsn1.your-objectstorage.com" }
    use_lockfile = true

    # Hetzner has the storage, and nothing else of Amazon's.
    skip_credentials_validation = true
    skip_metadata_api_check     = true
    skip_region_validation      = true
    skip_requesting_account_id  = true
    skip_s3_checksum            = true
  }
}
