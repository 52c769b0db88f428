#include "trainer/models/config_file.h"

#include <sstream>

namespace corank {
namespace {

// Fields of every configuration of transformers; quantization_config is read by bitsandbytes.cpp.
const char* const kCommon =
    "add_cross_attention architectures attn_implementation auto_map bos_token_id chunk_size_feed_forward "
    "cls_token_id cross_attention_hidden_size decoder_start_token_id dtype eos_token_id finetuning_task "
    "gradient_checkpointing id2label initializer_range is_decoder is_encoder_decoder label2id mask_token_id "
    "model_type name_or_path num_labels output_attentions output_hidden_states pad_token_id prefix problem_type "
    "pruned_heads quantization_config return_dict sep_token_id task_specific_params tf_legacy_loss "
    "tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers_version unk_token_id use_bfloat16 "
    "use_cache";

// How to generate: transformers moved it to generation_config.json.
const char* const kGeneration =
    "assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty "
    "do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff "
    "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length "
    "max_new_tokens min_length no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule "
    "num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty "
    "return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p";

// Notes of other programs, which no code of transformers' families reads.
const char* const kNotes =
    "full_attn_mod interpolate_factor is_llama_config lm_head_bias max_seq_length max_sequence_length "
    "model_max_length output_past padding_side pretraining_tp qkv_bias rope_interleaved seq_length "
    "tokenizer_model_max_length tokenizer_padding_side transformers.js_config unsloth_fixed unsloth_version "
    "use_flash_attn use_mrope";

}  // namespace

int64_t ConfigFile::get_size(const std::string& key, int64_t default_value, int64_t most) const {
  const auto size = get<int64_t>(key, default_value);
  if (size < 1) fail(fmt::format("{} is {} and must be positive", key, size));
  if (size > most) fail(fmt::format("{} is {}, and no model has more than {}", key, size, most));
  return size;
}

double ConfigFile::get_positive(const std::string& key) const {
  const auto number = get<double>(key);
  if (!(number > 0)) fail(fmt::format("{} is {} and must be positive", key, number));
  return number;
}

double ConfigFile::get_probability(const std::string& key, double default_value) const {
  const auto p = get<double>(key, default_value);
  if (!(p >= 0 && p < 1)) fail(fmt::format("{} is {} and must be in [0, 1)", key, p));
  return p;
}

void ConfigFile::refuse(const std::string& what) const {
  fail(what + ". It changes the result and is not supported; remove it or use another model");
}

void ConfigFile::done() const {
  for (const std::string& key : unknown()) {
    if (key.starts_with('_')) ignore({key});
  }
  JsonObject::done();
}

void ignore_bookkeeping(const ConfigFile& file) {
  for (const char* keys : {kCommon, kGeneration, kNotes}) {
    std::istringstream words(keys);
    for (std::string key; words >> key;) file.ignore({key});
  }
}

std::vector<int64_t> layer_windows(const ConfigFile& file, int64_t num_layers, std::optional<int64_t> window,
                                   int64_t first) {
  const auto types = file.get_optional<std::vector<std::string>>("layer_types");
  if (types && static_cast<int64_t>(types->size()) != num_layers) file.fail("layer_types must name every layer");
  std::vector<int64_t> windows;
  for (int64_t i = 0; i < num_layers; ++i) {
    const std::string type = types ? types->at(i) : window && i >= first ? "sliding_attention" : "full_attention";
    if (type != "full_attention" && type != "sliding_attention") {
      file.refuse("layer_types holds " + shown_key(type));
    }
    if (type == "sliding_attention" && !window) {
      file.fail(
          "layer_types asks for sliding_attention, and no sliding_window is in use (use_sliding_window, "
          "sliding_window)");
    }
    windows.push_back(type == "sliding_attention" ? *window : 0);
  }
  return windows;
}

std::optional<int64_t> sliding_window(const ConfigFile& file, std::optional<int64_t> default_value) {
  if (!file.contains("sliding_window")) return default_value;
  if (file.is_null("sliding_window")) return std::nullopt;
  return file.get_size("sliding_window", 0);
}

}  // namespace corank
