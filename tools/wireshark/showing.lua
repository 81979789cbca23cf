-- Showing ---------------------------------------------------------------------------------------

local add_layout

local function text_at(tvb, at, size)
  return tvb(at, size):stringz()
end

local function op_name(dialect, number)
  return OPS[DIALECTS[dialect].ops][number] or "?"
end

local function tensor_text(tvb, at, dialect)
  local op = u32(tvb, at + TENSOR.op)
  local entry = TYPES[u32(tvb, at + TENSOR.type)]
  local dims, last = {}, 1
  for i = 0, 3 do
    local ne = u32(tvb, at + TENSOR.ne + 4 * i)
    dims[i + 1] = whole(ne)
    if ne ~= 1 then last = i + 1 end
  end
  local shape = table.concat(dims, "x", 1, last)
  local name = text_at(tvb, at + TENSOR.name, 64)
  return string.format("%s'%s' %s %s", op > 0 and op_name(dialect, op) .. " " or "", name,
    entry and entry.name or "?", shape)
end

local function add_tensor(tree, tvb, at, label, dialect)
  local item = tree:add(tvb(at, TENSOR_SIZE), label .. ": " .. tensor_text(tvb, at, dialect))
  add_layout(item, tvb, at, "RpcTensor", dialect)
end

local function add_field(tree, tvb, at, f, dialect)
  local range = tvb(at, f.size)
  if f.kind == "bytes" then
    tree:add(FIELD[f.filter], range)
    return
  end
  if f.kind == "string" then
    tree:add(FIELD[f.filter], range, range:stringz())
    return
  end
  tree:add_le(FIELD[f.filter], range)
  if f.filter == "ggml_rpc.tensor.op" then
    local name = op_name(dialect, range:le_uint())
    tree:add(FIELD["ggml_rpc.tensor.op_name"], range, name):set_generated()
    local functions = FUNCTIONS[DIALECTS[dialect].ops][name]
    if functions then
      local params = tvb(at - f.at + TENSOR.op_params, 4)
      tree:add(FIELD["ggml_rpc.tensor.function"], params, functions[params:le_int()] or "?")
        :set_generated()
    end
  end
end

local READ = {
  uint8 = function(range) return whole(range:uint()) end,
  uint16 = function(range) return whole(range:le_uint()) end,
  uint32 = function(range) return whole(range:le_uint()) end,
  int32 = function(range) return whole(range:le_int()) end,
  uint64 = function(range) return "0x" .. range:le_uint64():tohex(16):gsub("^0+(.)", "%1") end,
  float = function(range) return string.format("%g", range:le_float()) end,
}

-- The values of an array in one line, its elements below it; zeros at its end are left out.
local function add_array(tree, tvb, at, f, dialect)
  local values, last = {}, 1
  for i = 1, f.count do
    values[i] = READ[f.kind](tvb(at + (i - 1) * f.size, f.size))
    if values[i] ~= "0" and values[i] ~= "0x0" then last = i end
  end
  local text = f.name .. ": " .. table.concat(values, ", ", 1, last)
  if last < f.count then text = text .. ", 0 ..." end
  local item = tree:add(tvb(at, f.count * f.size), text)
  for i = 0, f.count - 1 do add_field(item, tvb, at + i * f.size, f, dialect) end
end

function add_layout(tree, tvb, at, layout, dialect)
  for _, f in ipairs(LAYOUTS[layout].fields) do
    if f.count and not f.layout then
      add_array(tree, tvb, at + f.at, f, dialect)
    else
      for i = 0, (f.count or 1) - 1 do
        local place = at + f.at + i * f.size
        local label = f.count and string.format("%s[%d]", f.name, i) or f.name
        if f.layout == "RpcTensor" then
          add_tensor(tree, tvb, place, label, dialect)
        elseif f.layout then
          add_layout(tree:add(tvb(place, f.size), label), tvb, place, f.layout, dialect)
        else
          add_field(tree, tvb, place, f, dialect)
        end
      end
    end
  end
end

local function add_ids(tree, tvb, at, count, label, filter)
  local item = tree:add(tvb(at, 8 * count), string.format("%s: %d", label, count))
  for i = 0, count - 1 do item:add_le(FIELD[filter], tvb(at + 8 * i, 8)) end
end

local function add_tensors(tree, tvb, graph, dialect)
  tree:add_le(FIELD["ggml_rpc.n_tensors"], tvb(graph.tensors - 4, 4))
  if graph.n_tensors == 0 then return end
  local item = tree:add(tvb(graph.tensors, TENSOR_SIZE * graph.n_tensors),
    string.format("tensors: %d", graph.n_tensors))
  for i = 0, graph.n_tensors - 1 do
    add_tensor(item, tvb, graph.tensors + TENSOR_SIZE * i, string.format("[%d]", i), dialect)
  end
end

local function add_graph(tree, tvb, message)
  local graph = message.graph
  if not graph then
    tree:add(FIELD["ggml_rpc.data"], tvb(message.body, message.body_size)):append_text(
      " (its counts don't fill it)")
    return
  end
  if graph.n_steps then
    tree:add_le(FIELD["ggml_rpc.n_steps"], tvb(graph.at, 4))
    for i = 1, graph.n_steps do
      local at = graph.first_step + LAYOUTS.SplitStep.size * (i - 1)
      local item = tree:add(tvb(at, LAYOUTS.SplitStep.size), string.format("steps[%d]", i - 1))
      add_layout(item, tvb, at, "SplitStep", message.dialect)
    end
    if graph.n_ids > 0 then add_ids(tree, tvb, graph.ids, graph.n_ids, "ids", "ggml_rpc.ids") end
  else
    if graph.device then tree:add_le(FIELD["ggml_rpc.device"], tvb(graph.device, 4)) end
    tree:add_le(FIELD["ggml_rpc.n_nodes"], tvb(graph.nodes - 4, 4))
    if graph.n_nodes > 0 then
      add_ids(tree, tvb, graph.nodes, graph.n_nodes, "nodes", "ggml_rpc.nodes")
    end
  end
  add_tensors(tree, tvb, graph, message.dialect)
  if graph.n_swaps then
    tree:add_le(FIELD["ggml_rpc.n_swaps"], tvb(graph.tail, 4))
    tree:add_le(FIELD["ggml_rpc.n_parts"], tvb(graph.tail + 4, 4))
    local size = 4 + 8 * graph.n_parts
    for i = 0, graph.n_swaps - 1 do
      local at = graph.tail + 8 + size * i
      local item = tree:add(tvb(at, size), string.format("swaps[%d]", i))
      item:add_le(FIELD["ggml_rpc.swap.step"], tvb(at, 4))
      add_ids(item, tvb, at + 4, graph.n_parts, "ids", "ggml_rpc.ids")
    end
  end
end

local function title(message)
  local name = COMMAND_NAMES[message.command]
  if message.kind == "request" then return name end
  if message.kind == "answer" then return "answer to " .. name end
  if message.kind == "swaps" then return "swaps on a link" end
  return string.format("%s of step %d of %s", message.kind, message.step, name)
end

local function about(tvb, message)
  if message.kind ~= "request" then return "" end
  local first = LAYOUTS[message.spec.request].fields
  for _, f in ipairs(first) do
    if f.layout == "RpcTensor" and not f.count then
      local at = message.at + LAYOUTS.RequestFrame.size + f.at
      return " " .. tensor_text(tvb, at, message.dialect)
    end
  end
  if message.graph then
    return string.format(" %d nodes", message.graph.n_nodes)
  end
  return ""
end

local function show(message, tvb, pinfo, tree)
  local text = title(message) .. about(tvb, message)
  local item = tree:add(proto, tvb(message.at, message.seen), "ggml RPC, " .. text)
  item:add(FIELD["ggml_rpc.kind"], message.kind):set_generated()
  item:add(FIELD["ggml_rpc.number"], message.number):set_generated()
  -- The answer to HELLO decides.
  if message.command ~= NAMES.HELLO or message.kind == "answer" or message.answer_in then
    item:add(FIELD["ggml_rpc.protocol"], DIALECTS[message.dialect].name):set_generated()
  end
  if message.kind == "request" then
    add_layout(item, tvb, message.at, "RequestFrame", message.dialect)
    add_layout(item, tvb, message.at + LAYOUTS.RequestFrame.size, message.spec.request, message.dialect)
    if message.answer_in then
      item:add(FIELD["ggml_rpc.answer_in"], message.answer_in):set_generated()
    end
  else
    item:add(FIELD["ggml_rpc.command"], message.command):set_generated()
    if message.kind == "answer" then
      add_layout(item, tvb, message.at, "AnswerFrame", message.dialect)
      if message.spec.answer == "fixed" then
        local at = message.at + LAYOUTS.AnswerFrame.size
        add_layout(item, tvb, at, message.spec.response, message.dialect)
      end
    elseif message.step then
      item:add(FIELD["ggml_rpc.step"], message.step):set_generated()
    end
    if message.request.frame then
      item:add(FIELD["ggml_rpc.request_in"], message.request.frame):set_generated()
    end
    if message.time then item:add(FIELD["ggml_rpc.time"], message.time):set_generated() end
  end
  if message.kind == "request" and message.spec.body == "graph" then
    add_graph(item, tvb, message)
  elseif message.body_size > 0 then
    item:add(FIELD["ggml_rpc.data_size"], UInt64(message.body_size)):set_generated()
    local seen = message.seen - message.head
    if seen > 0 then item:add(FIELD["ggml_rpc.data"], tvb(message.body, seen)) end
  end
  return text
end

local function show_more(part, tvb, tree)
  local text = string.format("data of %s, bytes %.0f to %.0f of %.0f", title(part.of), part.from,
    part.from + part.size, part.of.body_size)
  local item = tree:add(proto, tvb(part.at, part.size), "ggml RPC, " .. text)
  item:add(FIELD["ggml_rpc.command"], part.of.command):set_generated()
  item:add(FIELD["ggml_rpc.number"], part.of.number):set_generated()
  if part.of.kind ~= "request" and part.of.request.frame then
    item:add(FIELD["ggml_rpc.request_in"], part.of.request.frame):set_generated()
    if part.of.time then item:add(FIELD["ggml_rpc.time"], part.of.time):set_generated() end
  end
  item:add(FIELD["ggml_rpc.data"], tvb(part.at, part.size))
  return text
end

-- What Wireshark calls --------------------------------------------------------------------------

local function looks_like_hello(tvb)
  local n = tvb:len()
  if n < 1 or tvb(0, 1):uint() ~= NAMES.HELLO then return false end
  if n < 9 then
    -- Clients may send the frame in pieces: then only the first bytes of a connection count.
    local seq = tcp_seq()
    if not seq or seq.value ~= 1 then return false end
  end
  for _, d in ipairs(DIALECTS) do
    local matches = true
    for i = 1, math.min(n, 9) - 1 do
      matches = matches and tvb(i, 1):uint() == (i == 1 and d.hello_size or 0)
    end
    if matches then return true end
  end
  return false
end

local function stream_of(tvb, pinfo)
  local id = tcp_stream()
  id = id and id.value or 0
  local source = tostring(pinfo.src) .. ":" .. pinfo.src_port
  local stream = streams[id]
  if not stream then
    local client = source
    if pinfo.src_port == proto.prefs.port and not looks_like_hello(tvb) then
      client = tostring(pinfo.dst) .. ":" .. pinfo.dst_port
    end
    stream = new_stream(client)
    streams[id] = stream
  end
  return stream, source == stream.client and CLIENT or SERVER
end

function proto.dissector(tvb, pinfo, tree)
  if tvb:len() == 0 then return 0 end
  local stream, side = stream_of(tvb, pinfo)
  -- A packet may be handed over in several pieces, and again whenever it is looked at.
  local key = table.concat({pinfo.number, tvb:offset(), tvb:len()}, ":")
  local found = stream.calls[key]
  if not found then
    found = read(stream, side, tvb, pinfo.number, pinfo.rel_ts)
    stream.calls[key] = found
  end
  pinfo.cols.protocol = "ggml RPC"
  local texts = {}
  for i, message in ipairs(found.messages) do
    texts[i] = message.more and show_more(message, tvb, tree) or show(message, tvb, pinfo, tree)
  end
  if found.missing then
    pinfo.desegment_offset = found.read
    pinfo.desegment_len = found.missing > 0 and found.missing or DESEGMENT_ONE_MORE_SEGMENT
    if #texts == 0 then texts[1] = "a part of a message" end
  end
  if found.lost then
    local item = tree:add(proto, tvb(found.read), "ggml RPC, not read: " .. found.lost)
    item:add_proto_expert_info(unreadable, found.lost)
    texts[#texts + 1] = found.lost
  end
  pinfo.cols.info = table.concat(texts, "; ")
  return tvb:len()
end

local function heuristic(tvb, pinfo, tree)
  if not looks_like_hello(tvb) then return false end
  pinfo.conversation = proto
  proto.dissector(tvb, pinfo, tree)
  return true
end

local port_in_use = nil

local function use_port()
  local ports = DissectorTable.get("tcp.port")
  if port_in_use then ports:remove(port_in_use, proto) end
  port_in_use = proto.prefs.port
  ports:add(port_in_use, proto)
end

proto.prefs_changed = use_port
use_port()
proto:register_heuristic("tcp", heuristic)
