// Samples the model of examples/fashion_dit from a file of toca_compile.export, with guidance and DDIM, without Python:
//
//     sample_exported dit.pt2 pictures.pgm [pictures.pt]
//
// (dit.pt2: exported for a batch of 4, called by name; build: cmake -DCMAKE_PREFIX_PATH=$(python -c "import torch;
// print(torch.utils.cmake_prefix_path)") . && cmake --build .)
// The file's table says which entry each step calls, with which values, buffers and host numbers: sizes of empty tensors.
#include <ATen/ATen.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include "json.h"
using at::Tensor;
using Loader = torch::inductor::AOTIModelPackageLoader;

class Model {
 public:
  explicit Model(const std::string& path) {
    caffe2::serialize::PyTorchStreamReader file(path);
    auto [json, size] = file.getRecord("extra/toca_compile.json");
    told_ = Json::parse(std::string(static_cast<char*>(json.get()), size));
    const Json& table = told_["table"];
    if (told_["about"]["format"].integer() != 3 || table["whole"].kind) throw std::runtime_error("a file of another form");
    auto [bytes, length] = file.getRecord("extra/toca_compile.weights");
    const char* start = static_cast<char*>(bytes.get());
    auto weights = torch::jit::pickle_load(std::vector<char>(start, start + length)).toGenericDict();
    values_.resize(table["places"].integer());
    for (const auto& [place, name] : table["weights"].object)
      values_[std::stol(place)] = weights.at(name.string).toTensor();
    for (const Json& call : table["calls"].list) {
      const std::string& entry = call["entry"].string;
      if (!entries_.count(entry)) entries_[entry] = std::make_unique<Loader>(path, entry);
    }
    if (table["open"].kind != Json::Null) throw std::runtime_error("this example runs files of fixed sizes");
    if (table["test"].kind != Json::Null) throw std::runtime_error("this example runs plans without a threshold");
    reset();
  }

  void reset() {
    step_ = 0;
    buffers_.clear();
    for (const Json& kept : told_["table"]["buffers"].list) {
      auto dtype = kept["dtype"].string == "int32" ? at::kInt : at::kFloat;
      buffers_.push_back(at::zeros(kept["shape"].integers(), dtype));
    }
  }

  Tensor operator()(const std::map<std::string, Tensor>& arguments) {  // the next step
    const Json& table = told_["table"];
    std::vector<Tensor> values = values_;
    for (const auto& [place, name] : table["inputs"].object) values[std::stol(place)] = arguments.at(name.string);
    for (const char* front : {"constant", "timed"})  // in Python these are kept, for a run and by timestep
      for (long number : table[front].integers()) call(number, {}, values, false);
    const Json& step = table["steps"].list.at(step_);
    const Json& row = table["rows"].list.at(step["row"].integer());
    for (size_t i = 0; i < row["calls"].list.size(); ++i)
      call(row["calls"].list[i].integer(), step["numbers"].list[i].integers(), values, true);
    if (++step_ == table["steps"].list.size()) reset();
    return values.at(table["results"].list.at(0).list.at(0).integer());
  }

  const Json& config() const { return told_["about"]["config"]; }
 private:
  void call(long number, const std::vector<long>& numbers, std::vector<Tensor>& values, bool frees) {
    const Json& call = told_["table"]["calls"].list.at(number);
    std::vector<Tensor> given;
    for (long place : call["values"].integers()) given.push_back(values.at(place));
    auto next = numbers.begin();
    for (const Json& slot : call["slots"].list) {
      if (slot.kind == Json::Null) {
        given.push_back(at::empty({0, std::max(*next, 0L), std::max(-*next, 0L)}, at::kChar));
        ++next;
      } else {
        given.push_back(buffers_.at(slot.integer()));
      }
    }
    std::vector<Tensor> made = entries_.at(call["entry"].string)->run(given);
    for (size_t i = 0; i < made.size(); ++i) values.at(call["results"].list.at(i).integer()) = made[i];
    for (long place : call["free"].integers())
      if (frees) values.at(place) = Tensor();
  }

  Json told_;
  std::map<std::string, std::unique_ptr<Loader>> entries_;
  std::vector<Tensor> values_, buffers_;
  size_t step_ = 0;
};

// Rows of pictures in [-1, 1] as one grey picture.
void write_pgm(const Tensor& pictures, const std::string& path) {
  Tensor row = at::cat(pictures.squeeze(1).unbind(0), 1);
  Tensor grey = ((row.clamp(-1, 1) + 1) * 127.5).round().to(at::kByte).contiguous();
  std::ofstream file(path, std::ios::binary);
  file << "P5\n" << grey.size(1) << " " << grey.size(0) << "\n255\n";
  file.write(static_cast<char*>(grey.data_ptr()), grey.numel());
}

int main(int count, char** given) {
  if (count < 3) return 2;
  c10::InferenceMode without_gradients;
  Model model(given[1]);
  const long steps = 50, pictures = 2, size = model.config()["sample_size"].integer();
  const double guidance = 1.5;
  Tensor x = at::randn({pictures, 1, size, size}, at::make_generator<at::CPUGeneratorImpl>(0));
  Tensor labels = at::arange(pictures);
  Tensor pair = at::cat({labels, at::full_like(labels, model.config()["num_embeds_ada_norm"].integer())});
  Tensor alphas = at::cumprod(1 - at::linspace(1e-4, 0.02, 1000), 0);
  for (long i = 0; i < steps; ++i) {
    const long t = (steps - 1 - i) * (1000 / steps), before = t - 1000 / steps;
    Tensor noise = model({{"hidden_states", at::cat({x, x})},
                          {"timestep", at::full({2 * pictures}, t, at::kLong)},
                          {"class_labels", pair}});
    auto halves = noise.chunk(2);
    noise = halves[1] + guidance * (halves[0] - halves[1]);
    Tensor alpha = alphas[t], next = before >= 0 ? alphas[before] : at::ones({});
    Tensor clean = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt();
    x = next.sqrt() * clean + (1 - next).sqrt() * noise;
  }
  write_pgm(x, given[2]);
  if (count > 3) {
    std::vector<char> bytes = torch::jit::pickle_save(x);
    std::ofstream(given[3], std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }
}
