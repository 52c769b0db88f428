#include "launch/plan_text.h"

#include <fmt/format.h>

#include <array>
#include <nlohmann/json.hpp>

#include "launch/console.h"

namespace corank {
namespace {

using nlohmann::ordered_json;

struct MemoryPart {
  const char* name;
  int64_t MemoryPlan::*bytes;
};
constexpr std::array kMemoryParts{
    MemoryPart{"base", &MemoryPlan::base},
    MemoryPart{"adapter", &MemoryPlan::adapter},
    MemoryPart{"gradients", &MemoryPlan::gradients},
    MemoryPart{"moments", &MemoryPlan::moments},
    MemoryPart{"activations", &MemoryPlan::activations},
    MemoryPart{"workspace", &MemoryPlan::workspace},
};

double percent(const Plan& plan) {
  return 100.0 * static_cast<double>(plan.trained) / static_cast<double>(plan.all_parameters);
}

std::string product_line(const PlanReport& report, const Plan& plan) {
  const int64_t micro = plan.layout.micro_batch_size;
  return fmt::format("ranks {} = dp {} x tp {}, global batch {} = {} dp x {} accumulation x {} micro-batch", plan.ranks,
                     plan.data, plan.layout.tensor, report.global_batch_size, plan.data,
                     report.global_batch_size / (plan.data * micro), micro);
}

std::string memory_table(const PlanReport& report) {
  std::string text = fmt::format("{:<28} {:>14} {:>18}\n", "memory a rank", "this run", "full fine-tuning");
  for (const MemoryPart& part : kMemoryParts) {
    text += fmt::format("  {:<26} {:>14} {:>18}\n", part.name, gib(report.run.memory.*part.bytes),
                        gib(report.full.memory.*part.bytes));
  }
  const auto verdict = [](const Plan& plan) { return plan.fits() ? "fits" : "too large"; };
  text +=
      fmt::format("  {:<26} {:>14} {:>18}\n", "total", gib(report.run.memory.total()), gib(report.full.memory.total()));
  return text + fmt::format("  {:<26} {:>14} {:>18}\n", "in " + gib(report.run.available), verdict(report.run),
                            verdict(report.full));
}

std::string traffic_lines(const char* title, const Plan& plan) {
  std::string text = fmt::format("{:<28} {:>18} {:>18} {:>18} {:>10}\n", title, "handed over", "sent inside host",
                                 "sent between hosts", "seconds");
  for (const PlannedTraffic& line : plan.traffic) {
    text += fmt::format("  {:<26} {:>18} {:>18} {:>18} {:>10.4f}\n", name(line.purpose), grouped(line.payload),
                        grouped(line.sent_inside), grouped(line.sent_between), line.seconds);
  }
  if (plan.traffic.empty()) text += "  nothing: one rank\n";
  return text;
}

std::string time_line(const char* title, const Plan& plan) {
  return fmt::format(
      "  {:<26} {:>9.4f} s = {:.4f} s of compute + {:.4f} s of communication, {:.0f} tokens/s, {:.0f} a rank\n", title,
      plan.step_seconds(), plan.compute_seconds, plan.communication_seconds(), plan.tokens_per_second(),
      plan.tokens_per_second() / plan.ranks);
}

std::string layout_lines(const char* title, const std::vector<Plan>& plans) {
  std::string text = fmt::format("{}\n", title);
  for (const Plan& plan : plans) {
    text += fmt::format(
        "  dp {:<4} x tp {:<3} shard_base {:<5} micro-batch {:<3} recomputed {:<5} {:>11} {:>9.4f} s {:>10.0f} "
        "tokens/s\n",
        plan.data, plan.layout.tensor, plan.layout.shard_base, plan.layout.micro_batch_size,
        name_of(plan.layout.checkpointing), gib(plan.memory.total()), plan.step_seconds(), plan.tokens_per_second());
  }
  if (plans.empty()) text += "  none fits\n";
  return text;
}

std::string assumptions(const Cluster& c) {
  const DeviceRates& d = c.device;
  std::string text = fmt::format(
      "assumed: full sequences; {} with {:.4g} TFLOP/s (bfloat16 products), {:.4g} (attention), {:.0f} GB/s memory; "
      "{:.4g} GB/s a rank inside a host of {} ranks",
      d.name, d.product_tflops, d.attention_tflops, d.memory_gbps, d.link.gbps, c.ranks_per_host);
  if (c.ranks > c.ranks_per_host) {
    text += fmt::format(", {:.4g} GB/s a host and {:.3g} us a hop between hosts", c.between.gbps, c.between.latency_us);
  }
  return text + "; weights are gathered beside the work, nothing else overlaps";
}

ordered_json to_json(const Plan& plan) {
  ordered_json memory, traffic = ordered_json::object();
  for (const MemoryPart& part : kMemoryParts) memory[part.name] = plan.memory.*part.bytes;
  memory["total"] = plan.memory.total();
  memory["available"] = plan.available;
  memory["fits"] = plan.fits();
  for (const PlannedTraffic& line : plan.traffic) {
    traffic[std::string(name(line.purpose))] = {{"payload", line.payload},
                                                {"sent_inside_hosts", line.sent_inside},
                                                {"sent_between_hosts", line.sent_between},
                                                {"seconds", line.seconds}};
  }
  return {{"layout",
           {{"ranks", plan.ranks},
            {"data", plan.data},
            {"tensor", plan.layout.tensor},
            {"shard_base", plan.layout.shard_base},
            {"micro_batch_size", plan.layout.micro_batch_size},
            {"activation_checkpointing", name_of(plan.layout.checkpointing)}}},
          {"parameters", {{"trainable", plan.trained}, {"all", plan.all_parameters}, {"percent", percent(plan)}}},
          {"memory", memory},
          {"traffic", traffic},
          {"time",
           {{"compute", plan.compute_seconds},
            {"communication", plan.communication_seconds()},
            {"step", plan.step_seconds()},
            {"tokens_per_second", plan.tokens_per_second()}}}};
}

ordered_json to_json(const std::vector<Plan>& plans) {
  ordered_json list = ordered_json::array();
  for (const Plan& plan : plans) list.push_back(to_json(plan));
  return list;
}

ordered_json to_json(const Cluster& cluster) {
  const DeviceRates& d = cluster.device;
  return {{"device", d.name},
          {"product_tflops", d.product_tflops},
          {"float32_tflops", d.float32_tflops},
          {"attention_tflops", d.attention_tflops},
          {"memory_gbps", d.memory_gbps},
          {"inside_host_gbps", d.link.gbps},
          {"between_hosts_gbps", cluster.between.gbps},
          {"latency_us", cluster.between.latency_us},
          {"ranks_per_host", cluster.ranks_per_host}};
}

}  // namespace

std::string gib(int64_t bytes) { return fmt::format("{:.2f} GiB", static_cast<double>(bytes) / kGib); }

std::string plan_text(const PlanReport& r) {
  std::string text = fmt::format("trainable params: {} || all params: {} || trainable%: {:.4f}\n",
                                 grouped(r.run.trained), grouped(r.run.all_parameters), percent(r.run));
  text += product_line(r, r.run) + fmt::format(", recomputed: {}\n\n", name_of(r.run.layout.checkpointing));
  text += memory_table(r) + "\n";
  text += traffic_lines("bytes a step, rank 0", r.run);
  text += traffic_lines("as full fine-tuning", r.full);
  if (r.run.payload() > 0) {
    text += fmt::format("  full fine-tuning hands over {:.1f} times the bytes\n",
                        static_cast<double>(r.full.payload()) / static_cast<double>(r.run.payload()));
  }
  text += "\ntime a step\n" + time_line(("this run (" + r.method + ")").c_str(), r.run);
  text += time_line("full fine-tuning", r.full) + "\n";
  text += layout_lines("quickest layouts that fit, of every split", r.layouts);
  text += layout_lines("of full fine-tuning", r.full_layouts);
  return text + assumptions(r.cluster);
}

ordered_json plan_json(const PlanReport& r) {
  ordered_json result{{"model", r.model}, {"method", r.method}, {"quantization", r.quantization}};
  result.update(to_json(r.run));
  result["full"] = to_json(r.full);
  result["ratio"] =
      r.run.payload() > 0 ? static_cast<double>(r.full.payload()) / static_cast<double>(r.run.payload()) : 1.0;
  result["layouts"] = to_json(r.layouts);
  result["full_layouts"] = to_json(r.full_layouts);
  result["assumed"] = to_json(r.cluster);
  return result;
}

ordered_json scaling_json(const std::vector<ScalingPoint>& points) {
  ordered_json list = ordered_json::array();
  for (const ScalingPoint& point : points) {
    list.push_back({{"network", point.network}, {"ranks", point.ranks}, {"run", point.run}, {"full", point.full}});
  }
  return list;
}

}  // namespace corank
